# Each verb is one line of real work. PYTHON is the interpreter of the environment to use.
PYTHON ?= python3
BUILD  ?= build/dev
C_CODE := csrc/*.[ch] csrc/*/*.[ch] csrc/*/*.cpp ggml/kernels/*.[ch] tests/c/*.c tests/c/*/*.h

help:            ## what there is
	@grep -E '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

build:           ## the library, into build/dev and the source tree's package
	cmake -S . -B $(BUILD) -DPYLLAVA_WERROR=ON -DPYLLAVA_TESTS=ON && cmake --build $(BUILD) -j2 && mkdir -p pyllava/lib && rm -f pyllava/lib/libpyllava.* && cp $(BUILD)/libpyllava.* pyllava/lib/

test: build      ## the default test suite, and the C tests of kernels, threads and placement
	$(BUILD)/tests/c/test-pool && $(BUILD)/tests/c/test-placement && $(BUILD)/tests/c/test-kv-cache && $(BUILD)/tests/c/test-guard && $(BUILD)/tests/c/test-kernels && $(BUILD)/tests/c/test-fast-kernels && $(PYTHON) -m pytest -q -m "not slow and not reference"

test-arm:        ## the C tests of the kernels for 64-bit Arm, under QEMU; see CONTRIBUTING.md for what it needs
	cmake -S . -B build/arm -DCMAKE_TOOLCHAIN_FILE=tests/c/aarch64.cmake -DGGML_NATIVE=OFF -DPYLLAVA_WERROR=ON -DPYLLAVA_TESTS=ON && cmake --build build/arm --target test-pool test-placement test-kv-cache test-guard test-kernels test-fast-kernels test-hash test-cores -j2 && ctest --test-dir build/arm --output-on-failure

test-avx512:     ## the C tests of the kernels for AVX-512 and AVX-VNNI, emulated on AVX2
	cmake -S . -B build/emulated -DPYLLAVA_EMULATE=ON -DPYLLAVA_WERROR=ON -DPYLLAVA_TESTS=ON && cmake --build build/emulated --target test-fast-kernels -j2 && build/emulated/tests/c/test-fast-kernels avx2 avxvnni avx512 avx512vnni

test-vulkan:     ## the device tests on Vulkan, in software where there is no GPU; see CONTRIBUTING.md for what it needs
	cmake -S . -B build/vulkan -DGGML_VULKAN=ON $(VULKAN) && cmake --build build/vulkan -j2 && PYLLAVA_LIBRARY=build/vulkan/libpyllava.so PYLLAVA_TEST_DEVICES=Vulkan0,Vulkan1 GGML_VK_VISIBLE_DEVICES=0,0 $(PYTHON) -m pytest -q tests/test_devices.py

reference: build ## against torch and transformers, which must be installed
	PYLLAVA_REQUIRE_REFERENCE=1 $(PYTHON) -m pytest -q -m reference

slow: build      ## the tests that take minutes
	$(PYTHON) -m pytest -q -m slow

golden:          ## writes tests/goldens again; needs transformers
	$(PYTHON) -m tests.reference.write_goldens

fmt:             ## formats Python and C
	ruff format . && ruff check --fix . && clang-format -i $(C_CODE)

lint:            ## ruff, mypy --strict and clang-format
	ruff check . && ruff format --check . && mypy && clang-format --dry-run -Werror $(C_CODE)

vendor:          ## ggml's pinned sources into ggml/upstream, for source distributions and offline builds
	cmake -DPYLLAVA_VENDOR=ON -P ggml/fetch.cmake

.PHONY: help build test test-arm test-avx512 test-vulkan reference slow golden fmt lint vendor

"""Makes the folder that travels with the repository to a GPU machine without network. See README.md.

python bench/gpu/prepare.py [--plugin WHEEL|FILE] [--peer VERSION] [--out gpu-kit] [--limit 64]

It holds the pinned ggml's sources, the back end's plug-in, packed, and the Python packages that the tests
need. The plug-in is built by packaging/cuda for architecture 90 alone, which takes most of an hour on two
cores, unless it is given: a wheel or a library that was built for the same ggml. `--peer` adds llama.cpp,
built over the same ggml: of a version of llama-cpp-python that has this ggml. The folder and the repository's
files together must stay within `--limit` MiB.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import lzma
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from kit import ROOT, pinned_ggml

BUILD = ROOT / "build" / "gpu-kit"
PYTHON = "3.12"  # of the machine with the GPU
PACKAGES = ("gguf==0.19.0",)
PEER_PACKAGES = ("diskcache",)  # that llama-cpp-python imports
STUB = (  # what the plug-in calls in NVIDIA's driver, for linking where there is none
    "cuMemUnmap cuMemSetAccess cuMemRelease cuMemMap cuMemGetAllocationGranularity cuMemCreate cuMemAddressReserve "
    "cuMemAddressFree cuGetErrorString cuDeviceGetAttribute cuDeviceGet"
)
# Machine code alone, and not compressed by nvcc: its kernels are much alike, and xz sees all of them at once.
CUDA = {"CMAKE_CUDA_ARCHITECTURES": "90-real", "GGML_CUDA_COMPRESSION_MODE": "none"}
XZ = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 256 << 20}]


def run(*command: object, **options: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(word) for word in command], cwd=ROOT, env=environment | options, check=True)


def sources() -> Path:
    """The pinned ggml, as ggml/fetch.cmake brings it."""
    script, found = BUILD / "fetch.cmake", BUILD / "fetched.txt"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        f"include({ROOT}/ggml/fetch.cmake)\nfetch_ggml({BUILD}/fetch source)\nfile(WRITE {found} ${{source}})\n"
    )
    run("cmake", f"-DPython_EXECUTABLE={sys.executable}", "-P", script)
    return Path(found.read_text())


def pack_sources(source: Path, target: Path) -> None:
    """Packs the sources that a build for the CPU or CUDA reads."""
    others = {path.name for path in (source / "src").glob("ggml-*/")} - {"ggml-cpu", "ggml-cuda"}
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for name in ("CMakeLists.txt", "LICENSE", "cmake", "include", "src", "ggml.pc.in"):
            archive.add(
                source / name, name, filter=lambda entry: None if Path(entry.name).name in others else entry
            )


def cuda_flags() -> Iterator[str]:
    """CMake options: cuBLAS of the package nvidia-cublas if the toolkit has none, a stub without a driver."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    toolkit = Path(os.environ.get("CUDA_HOME", Path(os.path.realpath(nvcc)).parents[1]))
    if not (toolkit / "include").is_dir():
        toolkit = Path("/usr/local/cuda")
    yield f"CUDAToolkit_ROOT={toolkit}"
    if not (toolkit / "include" / "cublas_v2.h").exists():
        package = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
        headers = BUILD / "cublas"  # alone: the package's folder holds headers of another CUDA runtime, too
        headers.mkdir(parents=True, exist_ok=True)
        for header in (package / "include").glob("cublas*.h"):
            shutil.copy(header, headers)
        if not (headers / "cublas_v2.h").exists():
            raise SystemExit("no cuBLAS: pip install nvidia-cublas, of nvcc's version")
        yield f"CMAKE_CUDA_FLAGS=-I{headers}"
        for name in ("cublas", "cublasLt"):
            yield f"CUDA_{name}_LIBRARY={package / 'lib' / f'lib{name}.so.13'}"
    if not list(toolkit.rglob("libcuda.so")):
        stub = BUILD / "stub" / "libcuda.so"
        stub.parent.mkdir(parents=True, exist_ok=True)
        code = stub.with_suffix(".c")
        code.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in STUB.split()))
        run("cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", code, "-o", stub)
        yield f"CUDA_cuda_driver_LIBRARY={stub}"


def build_plugin() -> Path:
    """The wheel of packaging/cuda; what was compiled before is kept."""
    defines = [*(f"{name}={value}" for name, value in CUDA.items()), *cuda_flags()]
    flags = [word for define in defines for word in ("-C", f"cmake.define.{define}")]
    run(
        sys.executable, "-m", "pip", "wheel", "packaging/cuda", "--no-deps", "-w", BUILD / "dist",
        "-C", f"build-dir={BUILD / 'cuda'}", *flags,
        CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count()), CMAKE_GENERATOR="Ninja",
    )  # fmt: skip
    return max((BUILD / "dist").glob("pyllava_cuda-*.whl"), key=lambda path: path.stat().st_mtime)


def pack_plugin(plugin: Path, out: Path) -> None:
    if plugin.suffix == ".whl":
        with zipfile.ZipFile(plugin) as wheel:
            (name,) = (name for name in wheel.namelist() if Path(name).name.startswith("libggml-"))
            library = wheel.read(name)
    else:
        name, library = plugin.name, plugin.read_bytes()
    (out / f"{Path(name).name}.xz").write_bytes(lzma.compress(library, filters=XZ))
    print(f"{Path(name).name}: {len(library) / 1e6:.1f} MB", flush=True)


def wheels(out: Path, packages: tuple[str, ...]) -> None:
    """Fetches wheels of pure Python."""
    for package in packages:
        run(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version",
            PYTHON, "-d", out, package,
        )  # fmt: skip


def pack_peer(version: str, source: Path, out: Path) -> None:
    """llama.cpp and its multimodal library over our shared ggml, with the Python package around them."""
    work = BUILD / "peer"
    name = f"llama_cpp_python-{version}"
    if not (work / name).exists():
        run(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary",
            "llama-cpp-python", "-d", work, f"llama-cpp-python=={version}",
        )  # fmt: skip
        shutil.unpack_archive(work / f"{name}.tar.gz", work)
    text = (work / name / "vendor/llama.cpp/ggml/CMakeLists.txt").read_text()
    if version_lines(text) != version_lines((source / "CMakeLists.txt").read_text()):
        raise SystemExit(f"llama-cpp-python {version} has another ggml")
    llama, build = work / name / "vendor" / "llama.cpp", work / "build"
    defines = {"LLAMA": llama, "PYLLAVA": ROOT, "PYLLAVA_GGML_SOURCE": source}
    run(
        "cmake", "-G", "Ninja", "-S", Path(__file__).parent / "peer", "-B", build,
        *(f"-D{k}={v}" for k, v in defines.items()),
    )  # fmt: skip
    run("cmake", "--build", build, "--target", "llama", "mtmd", "-j", os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "llama_cpp"
        shutil.copytree(
            work / name / "llama_cpp", package, ignore=shutil.ignore_patterns("__pycache__", "server")
        )
        (package / "lib").mkdir(exist_ok=True)
        for library in ("llama", "mtmd"):
            (found,) = (p for p in build.rglob(f"lib{library}.so") if not p.is_symlink())
            target = package / "lib" / found.name
            run("strip", found, "-o", target)
        with tarfile.open(out / "peer.tar.xz", "w:xz", preset=9) as archive:
            archive.add(package, "llama_cpp")


def version_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("set(GGML_VERSION_")]


def travelling(out: Path) -> dict[str, int]:
    """Bytes of what travels: the repository's files that git does not ignore, and the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    tree = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return {"the repository": sum(path.stat().st_size for path in tree if path.is_file()), **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plugin", type=Path, help="a wheel or a library, instead of building packaging/cuda"
    )
    parser.add_argument("--no-plugin", action="store_true", help="none: for a dry run on the CPU")
    parser.add_argument("--peer", metavar="VERSION", help="of llama-cpp-python, with the same ggml")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-kit")
    parser.add_argument("--limit", type=float, default=64, help="MiB that may travel (default: 64)")
    options = parser.parse_args()
    source = sources()
    plugin = None if options.no_plugin else (options.plugin or build_plugin()).resolve()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        packing = pool.submit(pack_plugin, plugin, out) if plugin else None
        pack_sources(source, out / "ggml.tar.xz")
        wheels(out, PACKAGES + (PEER_PACKAGES if options.peer else ()))
        if options.peer:
            pack_peer(options.peer, source, out)
        if packing:
            packing.result()
    made = {"ggml": pinned_ggml(), "plugin": plugin and plugin.name, "peer": options.peer}
    (out / "kit.json").write_text(json.dumps(made) + "\n")
    sizes = travelling(out)
    for name, size in sizes.items():
        print(f"{size / 2**20:>8.2f} MiB  {name}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:>8.2f} MiB  together, of {options.limit:g}")
    if total > options.limit:
        raise SystemExit(f"too large by {total - options.limit:.2f} MiB")


if __name__ == "__main__":
    main()

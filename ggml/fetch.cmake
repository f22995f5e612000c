# fetch_ggml(dir out): puts the sources of the pinned ggml under dir and their path into out.
# Only ggml-python itself is taken as source: with ":all:" pip would build its build tools (cmake!) from source too.
# As a script (cmake -DPYLLAVA_VENDOR=ON -P ggml/fetch.cmake) it unpacks them into ggml/upstream.
set(GGML_PACKAGE ggml-python==0.0.45)
set(GGML_ARCHIVE ggml_python-0.0.45)
set(GGML_SHA256 10aac52075cf3c7ef2b00d6c35b1c23f7b018dbeff8ae8df67339b4be1166f05)

function(fetch_ggml dir out)
  set(archive ${dir}/${GGML_ARCHIVE}.tar.gz)
  if(NOT EXISTS ${archive})
    if(NOT Python_EXECUTABLE)
      find_program(Python_EXECUTABLE NAMES python3 python REQUIRED)
    endif()
    message(STATUS "Fetching ggml's sources (${GGML_PACKAGE})")
    execute_process(COMMAND ${Python_EXECUTABLE} -m pip download --quiet --disable-pip-version-check --no-deps
                            --no-binary ggml-python -d ${dir} ${GGML_PACKAGE}
                    RESULT_VARIABLE failed ERROR_VARIABLE text)
    if(NOT EXISTS ${archive})
      message(FATAL_ERROR "ggml's sources could not be fetched with pip (${failed}). Give a source tree with "
                          "-DPYLLAVA_GGML_SOURCE=DIR, or use an installed ggml with -DPYLLAVA_SYSTEM_GGML=ON.\n${text}")
    endif()
  endif()
  file(SHA256 ${archive} found)
  if(NOT found STREQUAL GGML_SHA256)
    file(REMOVE ${archive})
    message(FATAL_ERROR "${archive}: SHA-256 is ${found}, need ${GGML_SHA256}")
  endif()
  if(NOT EXISTS ${dir}/${GGML_ARCHIVE}/vendor/ggml/CMakeLists.txt)
    file(ARCHIVE_EXTRACT INPUT ${archive} DESTINATION ${dir})
  endif()
  set(${out} ${dir}/${GGML_ARCHIVE}/vendor/ggml PARENT_SCOPE)
endfunction()

if(PYLLAVA_VENDOR)
  set(work ${CMAKE_CURRENT_LIST_DIR}/upstream.tmp)
  fetch_ggml(${work} source)
  file(REMOVE_RECURSE ${CMAKE_CURRENT_LIST_DIR}/upstream)
  file(RENAME ${source} ${CMAKE_CURRENT_LIST_DIR}/upstream)
  file(REMOVE_RECURSE ${work})
endif()

# PYLLAVA_PLUGINS: ggml as two shared libraries, and its back ends as modules that are loaded at run time.
# The libraries carry our name and ggml's version. So a process may hold another ggml as well, and a module that was
# built for another version of it is refused by the system's loader before any of its code runs.
get_directory_property(GGML_FOUND DIRECTORY ${source} DEFINITION GGML_VERSION)
foreach(target ggml-base ggml)
  set_target_properties(${target} PROPERTIES OUTPUT_NAME pyllava-${target}-${GGML_FOUND})
endforeach()

if(APPLE)
  set(origin "@loader_path")
else()
  set(origin "$ORIGIN")
endif()
set(places pyllava/lib nvidia/cu13/lib nvidia/cuda_runtime/lib nvidia/cublas/lib)
set(PYLLAVA_RPATH ${origin} PARENT_SCOPE)
set(PYLLAVA_ENGINE_FILES ggml-base ggml)
foreach(target ${GGML_AVAILABLE_BACKENDS})                # from the cache: some may have been of an earlier run
  if(TARGET ${target})
    list(APPEND PYLLAVA_ENGINE_FILES ${target})
  endif()
endforeach()
set(PYLLAVA_ENGINE_FILES ${PYLLAVA_ENGINE_FILES} PARENT_SCOPE)
set_property(TARGET ggml PROPERTY PUBLIC_HEADER)
foreach(target ${PYLLAVA_ENGINE_FILES})
  set_property(TARGET ${target} PROPERTY VERSION)        # one file each: wheels hold no symbolic links
  set_property(TARGET ${target} PROPERTY SOVERSION)
  set_target_properties(${target} PROPERTIES INSTALL_RPATH "${origin}")
  if(UNIX AND NOT APPLE AND NOT target MATCHES "^ggml(-base)?$")        # the compiler shows templates of C++ as well
    target_link_options(${target} PRIVATE LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/plugins.map)
  endif()
endforeach()
if(PYLLAVA_PLUGIN)                        # in a package of its own: pyllava's folder, and where NVIDIA's packages put CUDA
  list(TRANSFORM places PREPEND ${origin}/../)
  set_target_properties(ggml-${PYLLAVA_PLUGIN} PROPERTIES INSTALL_RPATH "${places}")
endif()

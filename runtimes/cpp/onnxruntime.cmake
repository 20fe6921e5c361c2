# dlo::onnxruntime: ONNX Runtime's C++ API. By path, where ORT_INCLUDE (a folder with onnxruntime_cxx_api.h) and ORT_LIBRARY
# (libonnxruntime.so, of any version from 1.23.1 on) are given; else by find_package(onnxruntime).
if(TARGET dlo::onnxruntime)
  return()
endif()
set(ORT_INCLUDE "" CACHE PATH "Folder with onnxruntime_cxx_api.h")
set(ORT_LIBRARY "" CACHE FILEPATH "libonnxruntime.so; the Python package onnxruntime has one in its folder capi/")
if(NOT ORT_INCLUDE AND NOT ORT_LIBRARY)
  find_package(onnxruntime QUIET)
  if(NOT TARGET onnxruntime::onnxruntime)
    message(FATAL_ERROR "ONNX Runtime is not found\n\n"
      "hint: -DORT_INCLUDE=/path/to/include -DORT_LIBRARY=/path/to/libonnxruntime.so")
  endif()
  add_library(dlo::onnxruntime INTERFACE IMPORTED)
  target_link_libraries(dlo::onnxruntime INTERFACE onnxruntime::onnxruntime)
  return()
endif()
if(NOT EXISTS "${ORT_INCLUDE}/onnxruntime_cxx_api.h")
  message(FATAL_ERROR "ORT_INCLUDE is '${ORT_INCLUDE}', expected a folder with onnxruntime_cxx_api.h")
endif()
if(NOT EXISTS "${ORT_LIBRARY}" OR IS_DIRECTORY "${ORT_LIBRARY}")
  message(FATAL_ERROR "ORT_LIBRARY is '${ORT_LIBRARY}', expected a file such as libonnxruntime.so.1.32.0")
endif()

# A Python package has the library under the name of its version alone, and programs look for libonnxruntime.so.1: the
# build folder gets a link of that name, which programs built here find by their run path.
get_filename_component(dlo_library "${ORT_LIBRARY}" REALPATH)
if(dlo_library MATCHES "\\.so\\.([0-9]+)[0-9.]*$")
  set(dlo_link "${CMAKE_BINARY_DIR}/onnxruntime/libonnxruntime.so.${CMAKE_MATCH_1}")
  file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/onnxruntime")
  file(CREATE_LINK "${dlo_library}" "${dlo_link}" SYMBOLIC)
  set(dlo_library "${dlo_link}")
endif()
add_library(dlo::onnxruntime SHARED IMPORTED)
set_target_properties(dlo::onnxruntime PROPERTIES
  IMPORTED_LOCATION "${dlo_library}"
  INTERFACE_INCLUDE_DIRECTORIES "${ORT_INCLUDE}")

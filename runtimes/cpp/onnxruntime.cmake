# dlo::onnxruntime: ONNX Runtime's C++ API. By path, where ORT_INCLUDE (a folder with onnxruntime_cxx_api.h) and ORT_LIBRARY
# (libonnxruntime.so, of any version from 1.23.1 on) are given; else by find_package(onnxruntime). Where it cannot be had,
# dlo_onnxruntime_problem says why: an error for one project, for another a package that it does without.
cmake_policy(VERSION 3.21)  # a caller's older policies would let the cache variables below hide what the caller has set
set(dlo_onnxruntime_problem "")
if(TARGET dlo::onnxruntime)
  return()
endif()
set(ORT_INCLUDE "" CACHE PATH "Folder with onnxruntime_cxx_api.h")
set(ORT_LIBRARY "" CACHE FILEPATH "libonnxruntime.so; the Python package onnxruntime has one in its folder capi/")
set(dlo_least 1.23.1)  # older ones refuse the graph's opset, or compute wrong numbers
set(dlo_hint "\n\nhint: -DORT_INCLUDE=/path/to/include -DORT_LIBRARY=/path/to/libonnxruntime.so")

if(NOT ORT_INCLUDE AND NOT ORT_LIBRARY)
  find_package(onnxruntime QUIET)
  if(NOT TARGET onnxruntime::onnxruntime)
    set(dlo_onnxruntime_problem "ONNX Runtime is not found${dlo_hint}")
  elseif(onnxruntime_VERSION AND onnxruntime_VERSION VERSION_LESS dlo_least)
    set(dlo_onnxruntime_problem
      "ONNX Runtime ${onnxruntime_VERSION} in ${onnxruntime_DIR} is too old, expected ${dlo_least} or newer${dlo_hint}")
  else()
    add_library(dlo::onnxruntime INTERFACE IMPORTED)
    target_link_libraries(dlo::onnxruntime INTERFACE onnxruntime::onnxruntime)
  endif()
  return()
endif()
if(NOT EXISTS "${ORT_INCLUDE}/onnxruntime_cxx_api.h")
  set(dlo_onnxruntime_problem "ORT_INCLUDE is '${ORT_INCLUDE}', expected a folder with onnxruntime_cxx_api.h")
  return()
endif()
if(NOT EXISTS "${ORT_LIBRARY}" OR IS_DIRECTORY "${ORT_LIBRARY}")
  set(dlo_onnxruntime_problem "ORT_LIBRARY is '${ORT_LIBRARY}', expected a file such as libonnxruntime.so.1.32.0")
  return()
endif()

# A program asks for the interface of its headers' version, and ends in a null pointer where the library has none such.
get_filename_component(dlo_library "${ORT_LIBRARY}" REALPATH)
file(STRINGS "${ORT_INCLUDE}/onnxruntime_c_api.h" dlo_headers REGEX "^#define ORT_API_VERSION [0-9]+")
string(REGEX REPLACE "[^0-9]" "" dlo_headers "${dlo_headers}")
if(dlo_library MATCHES "\\.so\\.(([0-9]+)\\.([0-9]+)[0-9.]*)$")
  set(dlo_version "${CMAKE_MATCH_1}")
  set(dlo_soname "libonnxruntime.so.${CMAKE_MATCH_2}")
  if(dlo_version VERSION_LESS dlo_least)
    set(dlo_onnxruntime_problem "ORT_LIBRARY is '${dlo_library}', too old, expected ${dlo_least} or newer")
    return()
  elseif(CMAKE_MATCH_3 LESS "${dlo_headers}")
    set(dlo_onnxruntime_problem "ORT_INCLUDE has headers of ONNX Runtime ${CMAKE_MATCH_2}.${dlo_headers}, \
newer than the library '${dlo_library}'\n\nhint: give its own headers, or older ones")
    return()
  endif()
  # Beside an installed library lies a link of the name that programs look for. A Python package has the library under
  # the name of its version alone: the build folder gets such a link, which programs built here find by their run path.
  get_filename_component(dlo_folder "${dlo_library}" DIRECTORY)
  if(NOT EXISTS "${dlo_folder}/${dlo_soname}" AND NOT EXISTS "${dlo_folder}/${dlo_soname}.${CMAKE_MATCH_3}")
    file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/onnxruntime")
    file(CREATE_LINK "${dlo_library}" "${CMAKE_BINARY_DIR}/onnxruntime/${dlo_soname}" SYMBOLIC)
    set(dlo_library "${CMAKE_BINARY_DIR}/onnxruntime/${dlo_soname}")
  endif()
endif()
add_library(dlo::onnxruntime SHARED IMPORTED)
set_target_properties(dlo::onnxruntime PROPERTIES
  IMPORTED_LOCATION "${dlo_library}"
  INTERFACE_INCLUDE_DIRECTORIES "${ORT_INCLUDE}")

# Decides whether the CUDA kernels are built; sets SPURGE_HAS_CUDA and SPURGE_CUDA_ARCHS.
# CUDA has to be enabled before pybind11_add_module runs, or CMake finds no architectures.

set(SPURGE_HAS_CUDA OFF)
if(NOT SPURGE_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(SPURGE_HAS_CUDA ON)
  elseif(SPURGE_CUDA STREQUAL "AUTO")
    message(STATUS "spurge: no nvcc found, building for the CPU only")
  else()
    message(FATAL_ERROR "SPURGE_CUDA=${SPURGE_CUDA}, but no CUDA compiler was found. "
      "Put nvcc on PATH or set CUDACXX, or build with SPURGE_CUDA=OFF.")
  endif()
endif()

if(SPURGE_HAS_CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static) # nothing to find at run time, and no CUDA library in NEEDED
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # Machine code for each generation, PTX only for the newest: later cards compile that one.
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_says)
    if(nvcc_says MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_LESS 12.8)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90)
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90-real 100-real 120)
    endif()
  endif()
  enable_language(CUDA)
  set(SPURGE_CUDA_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
  message(STATUS "spurge: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${SPURGE_CUDA_ARCHS}")
endif()

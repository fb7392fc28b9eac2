# spurge_flags(target): warnings and floating-point rules, the same for every C++ and CUDA file.
function(spurge_flags target)
  string(REPLACE ";" " " arch_text "${SPURGE_CUDA_ARCHS}")
  if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    # No contraction to fused multiply-add: every instruction set and the GPU round alike.
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off -Wall -Wextra>
      $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${SPURGE_WERROR}>>:-Werror>)
  elseif(MSVC)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:/fp:precise /W3>)
    target_compile_definitions(${target} PRIVATE NOMINMAX)
  endif()
  if(SPURGE_HAS_CUDA)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Xcompiler=-Wall>)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
    else()
      target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xfatbin -compress-all>")
    endif()
    target_compile_definitions(${target} PRIVATE
      SPURGE_HAS_CUDA
      SPURGE_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
      SPURGE_CUDA_ARCHS="${arch_text}")
  endif()
endfunction()

# spurge_isa_levels(target sources...): compile the sources once per instruction set into the target.
# Each copy lives in the namespace spurge::<level>; isa.cpp chooses one at run time, so no flag of a
# higher level ever reaches code that runs unguarded.
function(spurge_isa_levels target)
  set(levels baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND NOT MSVC)
    list(APPEND levels avx2 avx512)
    target_compile_definitions(${target} PRIVATE SPURGE_X86_LEVELS)
  endif()
  set(flags_avx2 -mavx2 -mfma -mf16c)
  set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 header starts from undefined registers and warns about it (bug 105593).
    list(APPEND flags_avx512 -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
  foreach(level IN LISTS levels)
    add_library(spurge_${level} OBJECT ${ARGN})
    spurge_flags(spurge_${level})
    target_include_directories(spurge_${level} PRIVATE
      ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/include)
    target_compile_definitions(spurge_${level} PRIVATE SPURGE_LEVEL=${level} SPURGE_LEVEL_${level})
    target_compile_options(spurge_${level} PRIVATE ${flags_${level}})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:spurge_${level}>)
  endforeach()
endfunction()

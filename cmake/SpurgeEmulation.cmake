# The CUDA sources on the host, for tests: the module _core_emulated, whose ops take tensors of the CPU for those of a GPU;
# spurge_races, which runs every kernel under ThreadSanitizer; and the example in C++ as it is built with CUDA.

set(emulation ${PROJECT_SOURCE_DIR}/csrc/emulation)
set(rewritten ${CMAKE_CURRENT_BINARY_DIR}/emulation)
file(GLOB_RECURSE cuda_files CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/*.cu ${PROJECT_SOURCE_DIR}/csrc/*.cuh)
foreach(source IN LISTS SPURGE_CUDA_SOURCES)
  string(REGEX REPLACE "^csrc/(.*)\\.cu$" "${rewritten}/\\1.cpp" output ${source})
  list(APPEND kernels ${output})
endforeach()
add_custom_command(OUTPUT ${kernels}
  COMMAND ${Python_EXECUTABLE} ${emulation}/rewrite.py ${PROJECT_SOURCE_DIR}/csrc ${rewritten}
  DEPENDS ${emulation}/rewrite.py ${cuda_files} VERBATIM)

# spurge_emulated(target flags...): the kernels and what runs them. The flags are the kernels' own.
function(spurge_emulated target)
  add_library(${target} OBJECT ${kernels})
  target_compile_options(${target} PRIVATE -O1 -g1 ${ARGN}
    -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Wno-sign-compare -Wno-missing-field-initializers)
  target_include_directories(${target} BEFORE PRIVATE ${emulation} ${rewritten}
    ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/include)
endfunction()

# Stops at an index beyond an array, at a pack that is not aligned, at a shift or a whole number that overflows.
spurge_emulated(spurge_emulated -fsanitize=bounds,alignment,shift,signed-integer-overflow
  -fsanitize-undefined-trap-on-error)
pybind11_add_module(_core_emulated MODULE NO_EXTRAS
  ${SPURGE_BINDINGS} csrc/bindings/bind_emulation.cpp ${emulation}/emulation.cpp)
target_compile_options(_core_emulated PRIVATE -ffp-contract=off -Wall -Wextra)
target_include_directories(_core_emulated PRIVATE csrc csrc/third_party)
target_link_libraries(_core_emulated PRIVATE spurge_emulated spurge_kernels)
target_compile_definitions(_core_emulated PRIVATE SPURGE_EMULATED SPURGE_HAS_CUDA SPURGE_VERSION="${PROJECT_VERSION}"
  SPURGE_CUDA_VERSION="emulated" SPURGE_CUDA_ARCHS="0")
spurge_emulated(spurge_emulated_races -fsanitize=thread)
add_executable(spurge_races ${emulation}/races.cpp ${emulation}/emulation.cpp)
target_compile_definitions(spurge_races PRIVATE SPURGE_EMULATION_TSAN)
target_include_directories(spurge_races PRIVATE csrc)
target_link_libraries(spurge_races PRIVATE spurge_emulated_races spurge_kernels)
target_link_options(spurge_races PRIVATE -fsanitize=thread)
add_executable(small_job_emulated ${PROJECT_SOURCE_DIR}/examples/cpp/small_job.cpp ${emulation}/emulation.cpp)
target_compile_definitions(small_job_emulated PRIVATE SPURGE_HAS_CUDA)
target_compile_options(small_job_emulated PRIVATE -ffp-contract=off -Wall -Wextra)
target_include_directories(small_job_emulated BEFORE PRIVATE ${emulation} ${PROJECT_SOURCE_DIR}/csrc)
target_link_libraries(small_job_emulated PRIVATE spurge_emulated spurge_kernels)

set(for_tests _core_emulated spurge_races small_job_emulated)
set_target_properties(${for_tests} PROPERTIES LINKER_LANGUAGE CXX CUDA_ARCHITECTURES OFF)
install(TARGETS ${for_tests} DESTINATION spurge)

# The C++ face as a CMake package, in the wheel beside the module, or (SPURGE_PYTHON=OFF) alone under the prefix:
#   find_package(spurge CONFIG REQUIRED)
#   target_link_libraries(program PRIVATE spurge::kernels)
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

if(SPURGE_PYTHON)
  set(headers spurge/include)
  set(libraries spurge/lib)
else()
  set(headers ${CMAKE_INSTALL_INCLUDEDIR})
  set(libraries ${CMAKE_INSTALL_LIBDIR})
endif()
set(where ${libraries}/cmake/spurge) # python -m spurge --cmake-dir

if(SPURGE_HAS_CUDA)
  # Named outright, so that a program without CUDA sources links too.
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(spurge_kernels PUBLIC CUDA::cudart_static)
  target_compile_definitions(spurge_kernels INTERFACE SPURGE_HAS_CUDA)
  set_target_properties(spurge_kernels PROPERTIES LINKER_LANGUAGE CXX)
endif()

install(TARGETS spurge_kernels EXPORT spurgeTargets
  ARCHIVE DESTINATION ${libraries}
  INCLUDES DESTINATION ${headers})
install(DIRECTORY include/spurge DESTINATION ${headers})
install(EXPORT spurgeTargets NAMESPACE spurge:: DESTINATION ${where})
configure_package_config_file(cmake/spurgeConfig.cmake.in spurgeConfig.cmake INSTALL_DESTINATION ${where})
write_basic_package_version_file(spurgeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/spurgeConfig.cmake
  ${PROJECT_BINARY_DIR}/spurgeConfigVersion.cmake
  DESTINATION ${where})

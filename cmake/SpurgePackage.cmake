# The C++ face as an installable CMake package:
#   find_package(spurge CONFIG REQUIRED)
#   target_link_libraries(program PRIVATE spurge::kernels)
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

if(SPURGE_HAS_CUDA)
  # Named outright, so that a program without CUDA sources links too.
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(spurge_kernels PUBLIC CUDA::cudart_static)
  set_target_properties(spurge_kernels PROPERTIES LINKER_LANGUAGE CXX)
endif()

set(where ${CMAKE_INSTALL_LIBDIR}/cmake/spurge)
install(TARGETS spurge_kernels EXPORT spurgeTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/spurge DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT spurgeTargets NAMESPACE spurge:: DESTINATION ${where})
configure_package_config_file(cmake/spurgeConfig.cmake.in spurgeConfig.cmake INSTALL_DESTINATION ${where})
write_basic_package_version_file(spurgeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/spurgeConfig.cmake
  ${PROJECT_BINARY_DIR}/spurgeConfigVersion.cmake
  DESTINATION ${where})

# CUDA kernels of csrc/cuda, opt-in: FASTLLM_CUDA=auto builds them only where nvcc AND a GPU are present.
# The CUDA runtime is linked statically (CMake's default) and finds the driver when it is first used,
# so the extension can be imported where there is none.
file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu
     ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cpp)
set(BUILD_CUDA OFF)
if(FASTLLM_CUDA STREQUAL "on" OR (FASTLLM_CUDA STREQUAL "auto" AND EXISTS /proc/driver/nvidia/version))
  # Often installed, but not on the PATH.
  find_program(NVCC nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NVCC)
    set(BUILD_CUDA ON)
  elseif(FASTLLM_CUDA STREQUAL "on")
    message(FATAL_ERROR "FASTLLM_CUDA=on, but nvcc was not found: put it on the PATH or set CUDA_HOME")
  endif()
endif()
if(BUILD_CUDA AND CUDA_SOURCES)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER ${NVCC})
  endif()
  set(CMAKE_CUDA_ARCHITECTURES "80;90a")
  enable_language(CUDA)
  add_library(fastllm_cuda STATIC ${CUDA_SOURCES})
  set_target_properties(fastllm_cuda PROPERTIES CUDA_STANDARD 17)
  target_include_directories(fastllm_cuda PRIVATE csrc)
  if(TARGET _C)
    target_link_libraries(_C PRIVATE fastllm_cuda)
    target_compile_definitions(_C PRIVATE FASTLLM_WITH_CUDA=1)
  endif()
endif()

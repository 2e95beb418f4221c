# Sets ADAPTRT_CUDA_COMPILER to an nvcc that compiles for the oldest and the newest GPU we build for, or to nothing, with
# one line that says why. CMake's own support for CUDA would stop at an nvcc that is there but does not work.
set(ADAPTRT_CUDA_COMPILER)
set(ADAPTRT_CUDA_GENERATE
    -gencode=arch=compute_80,code=[sm_80,compute_80] -gencode=arch=compute_90a,code=sm_90a)
if(NOT ADAPTRT_CUDA STREQUAL "OFF")
  find_program(ADAPTRT_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
  set(reason "no nvcc was found")
  if(ADAPTRT_NVCC)
    set(probe ${CMAKE_CURRENT_BINARY_DIR}/nvcc_probe)
    file(WRITE ${probe}.cu "#include <cuda_runtime.h>\n#include <thread>\n__global__ void kernel() {}\n")
    execute_process(
      COMMAND ${ADAPTRT_NVCC} -std=c++17 ${ADAPTRT_CUDA_GENERATE} -Xcompiler -fPIC -c ${probe}.cu -o ${probe}.o
      RESULT_VARIABLE result OUTPUT_QUIET ERROR_VARIABLE output)
    if(result EQUAL 0)
      set(ADAPTRT_CUDA_COMPILER ${ADAPTRT_NVCC})
      set(reason "built by ${ADAPTRT_NVCC}")
    else()
      string(REGEX REPLACE "[\r\n].*" "" output "${output}")
      set(reason "${ADAPTRT_NVCC} does not work: ${output}")
    endif()
  endif()
  message(STATUS "CUDA backend: ${reason}")
  if(ADAPTRT_CUDA STREQUAL "ON" AND NOT ADAPTRT_CUDA_COMPILER)
    message(FATAL_ERROR "ADAPTRT_CUDA=ON, but ${reason}")
  endif()
endif()

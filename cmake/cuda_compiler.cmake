# Chooses nvcc: the one that CMAKE_CUDA_COMPILER or CUDACXX names, else the PyPI wheels of the build requirements,
# else the one on the PATH. Sets CMAKE_CUDA_COMPILER and, for the wheels, JFA_CUDA_WHEELS to their root.

set(_oldest_version 12.9.86)  # nvcc of CUDA 12.9.1: ptxas 12.8.0 to 12.9.0 miscompiles causal masks

if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
  set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
endif()

if(NOT CMAKE_CUDA_COMPILER)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c [[
import importlib.util, pathlib
nvidia = importlib.util.find_spec("nvidia")
for folder in nvidia.submodule_search_locations if nvidia else []:
    for root in sorted(pathlib.Path(folder).glob("cu[0-9]*"), reverse=True):
        if (root / "bin" / "nvcc").is_file():
            raise SystemExit(print(root))
]]
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE JFA_CUDA_WHEELS COMMAND_ERROR_IS_FATAL ANY)
  if(JFA_CUDA_WHEELS)
    set(CMAKE_CUDA_COMPILER "${JFA_CUDA_WHEELS}/bin/nvcc")
    # The wheels put the libraries into lib, nvcc looks for them in lib64.
    string(APPEND CMAKE_CUDA_FLAGS " -L${JFA_CUDA_WHEELS}/lib")
  else()
    find_program(JFA_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    if(JFA_NVCC)
      set(CMAKE_CUDA_COMPILER "${JFA_NVCC}")
    endif()
  endif()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR
    "jax_flashattn: no CUDA compiler. Three ways out:\n"
    "  1. leave build isolation on (pip install .): pip then brings a CUDA 13.0 compiler from PyPI;\n"
    "     without isolation, install it first: pip install nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.*\n"
    "     nvidia-cuda-crt==13.0.* nvidia-cuda-runtime==13.0.* nvidia-cuda-cccl==13.0.*\n"
    "  2. name a compiler of CUDA 12.9.1 or newer: CUDACXX=<toolkit>/bin/nvcc pip install .\n"
    "  3. build without CUDA kernels, for the CPU: JFA_CUDA=OFF pip install .\n")
endif()

# Asked before enable_language(CUDA), whose own test of an old compiler fails with a riddle.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE _banner ERROR_VARIABLE _banner
  RESULT_VARIABLE _status)
if(NOT _status EQUAL 0 OR NOT _banner MATCHES "V([0-9]+\\.[0-9]+\\.[0-9]+)")
  message(FATAL_ERROR
    "jax_flashattn: ${CMAKE_CUDA_COMPILER} does not run as a CUDA compiler:\n${_status} ${_banner}\n"
    "Name one in CUDACXX, or unset CUDACXX and let pip bring one from PyPI.\n")
endif()
if(CMAKE_MATCH_1 VERSION_LESS _oldest_version)
  message(FATAL_ERROR
    "jax_flashattn: ${CMAKE_CUDA_COMPILER} is version ${CMAKE_MATCH_1}; CUDA 12.9.1 (${_oldest_version}) is the "
    "oldest that compiles these kernels correctly (ptxas 12.8.0 to 12.9.0 miscompiles causal masks).\n"
    "Name a newer one in CUDACXX, or unset CUDACXX and let pip bring CUDA 13.0 from PyPI.\n")
endif()
message(STATUS "CUDA compiler: ${CMAKE_CUDA_COMPILER} (${CMAKE_MATCH_1})")

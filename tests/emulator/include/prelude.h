// Included before everything else, and compiled once for many libraries: CUDA's vocabulary for a compiler that does not
// know it, then all headers that mutants of the kernels leave alone, so nothing that includes csrc.
#pragma once

#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __grid_constant__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include "api.h"
#include "common/device.cuh"
#include "sm80/ptx.cuh"
#include "wgmma.h"

// Included before everything else: CUDA's vocabulary for a compiler that does not know it.
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

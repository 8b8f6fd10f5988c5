// The portable family as the rest of the library sees it: sm_80 and everything newer.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.h"
#include "problem.h"
#include "sm80/tiles.h"

namespace jfa::sm80 {

struct Sm80 {};  // names this family's copies of common kernels

template <int kHeadDim>
Status launch_forward(const Problem& p, cudaStream_t stream);

// Everything but the bias gradient, which needs no more of it than delta.
template <int kHeadDim>
Status launch_backward(const Problem& p, const Gradients& g, cudaStream_t stream);
template <int kHeadDim>
Status launch_bias(const Problem& p, const Gradients& g, cudaStream_t stream);

}  // namespace jfa::sm80

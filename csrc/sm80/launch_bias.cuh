// Host side of the bias gradient. A backward ends with it, where it is asked for and no other family's kernel computes
// it.
#pragma once

#include "dispatch.h"
#include "sm80/backward_bias.cuh"
#include "sm80/family.h"

namespace jfa::sm80 {

template <int kHeadDim>
Status launch_bias(const Problem& p, const Gradients& g, cudaStream_t stream) {
  using Shape = RecomputeTile<kHeadDim>;
  const int64_t planes = int64_t(g.d_bias.batch) * g.d_bias.heads;
  return with_element(p.type, [&](auto element) {
    using Element = typename decltype(element)::type;
    return launch(
        "jax_flashattn sm80 backward_bias", backward_bias<Element, kHeadDim>,
        Grid{planes * BiasTiles<Shape>(p, g.d_bias).count(), Shape::kThreads, sizeof(RecomputeSmem<kHeadDim>)}, stream,
        p, g);
  });
}

}  // namespace jfa::sm80

// Host side of the Hopper backward: delta, then dK and dV with dQ's accumulator, then dQ.
#pragma once

#include "common/prepare_backward.cuh"
#include "dispatch.h"
#include "sm90/family.h"
#include "sm90/launch_backward_query.cuh"

namespace jfa::sm90 {

template <int kHeadDim>
Status launch_backward(const Problem& p, const Gradients& g, int multiprocessors, cudaStream_t stream) {
  return with_element(p.type, [&](auto element) {
    using Element = typename decltype(element)::type;
    Status status = launch_prepare_backward<Element, Sm90>(p, g, stream);
    if (status.ok() && (g.deterministic || kHeadDim >= 192)) {
      status = launch_backward_query<Element, kHeadDim>(p, g, g.counters + 1, multiprocessors, stream);
    }
    return status;
  });
}

}  // namespace jfa::sm90

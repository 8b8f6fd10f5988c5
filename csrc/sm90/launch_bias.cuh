// Host side of the Hopper kernel for the gradient of a bias.
#pragma once

#include <algorithm>

#include "sm90/backward_bias.cuh"
#include "sm90/backward_bias_tiles.h"
#include "sm90/family.h"

namespace jfa::sm90 {

template <class Element, class Shape>
Status launch_bias_tile(const Problem& p, const Gradients& g, int multiprocessors, cudaStream_t stream) {
  static_assert(sizeof(BackwardBiasSmem<Shape>) <= Shape::kSharedBytes && Shape::kSharedBytes <= kSharedMemoryLimit,
                "a tile of backward_bias_tiles.h does not fit into shared memory");
  const BiasItems<Shape> items(p);
  if (items.count > kMaxItems) {
    return Status::Unimplemented("the bias has " + std::to_string(items.count) +
                                 " tiles, too many for the work items of family sm90; the nearest is sm80");
  }
  BackwardBiasArguments a;
  a.p = p;
  a.g = g;
  a.items = static_cast<int>(items.count);
  a.along_q = items.along_q;
  a.along_k = items.along_k;
  a.in_pairs = p.scores.bias.k_len % 2 == 0;  // arrays begin at multiples of 16 bytes
  const jfa::Shape& s = p.shape;
  const auto map = [&](TensorMap& map, const Tensor& tensor, int dim, int length, int heads, int rows) {
    return make_tensor_map(map, tensor, p.type, dim, length, heads, s.batch, rows);
  };
  Status status = map(a.q, p.q, s.head_dim, s.q_len, s.heads, Shape::kQ);
  if (status.ok()) status = map(a.d_o, g.d_o, s.value_dim, s.q_len, s.heads, Shape::kQ);
  if (status.ok()) status = map(a.k, p.k, s.head_dim, s.k_len, s.kv_heads, Shape::kK / Shape::kCluster);
  if (status.ok()) status = map(a.v, p.v, s.value_dim, s.k_len, s.kv_heads, Shape::kK / Shape::kCluster);
  if (!status.ok()) return status;
  const int64_t workers = std::min(a.items, std::max(multiprocessors / Shape::kCluster, 1));
  return launch("jax_flashattn sm90 backward_bias", backward_bias<Element, Shape>,
                Grid{workers * Shape::kCluster, Shape::kThreads, Shape::kSharedBytes, Shape::kCluster}, stream, a);
}

template <int kHeadDim>
Status launch_bias(const Problem& p, const Gradients& g, int multiprocessors, cudaStream_t stream) {
  return with_element(p.type, [&](auto element) {
    using Element = typename decltype(element)::type;
    return with_backward_bias_tile<kHeadDim>(p, [&](auto tile) {
      return launch_bias_tile<Element, typename decltype(tile)::type>(p, g, multiprocessors, stream);
    });
  });
}

}  // namespace jfa::sm90

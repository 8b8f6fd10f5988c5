// Which tile of which batch entry and head a block works on. One grid dimension, so that neither heads nor batch can
// exceed a limit of 65535.
#pragma once

#include "common/device.cuh"
#include "common/math.cuh"
#include "problem.h"

namespace jfa {

// Tiles of one head run side by side and share what they read in the L2. Long work should not start last: in causal
// attention the last query tiles see the most keys, and the first key tiles are seen by the most queries.
enum class TileOrder { kLastFirst, kFirstFirst };

struct WorkItem {
  int tile, head, batch;

  __device__ __forceinline__ WorkItem(int index, int tiles, int heads, TileOrder order = TileOrder::kLastFirst)
      : tile(order == TileOrder::kLastFirst ? tiles - 1 - index % tiles : index % tiles),
        head(index / tiles % heads),
        batch(index / tiles / heads) {}
};

// The tiles of one plane of a bias gradient; an axis of extent 1 has one tile.
template <class Shape>
struct BiasTiles {
  int along_q, along_k;

  __host__ __device__ BiasTiles(const Problem& p, const ScoreTensor& bias)
      : along_q(bias.q_len == 1 ? 1 : ceil_div(p.shape.q_len, Shape::kQ)),
        along_k(bias.k_len == 1 ? 1 : ceil_div(p.shape.k_len, Shape::kK)) {}

  __host__ __device__ int count() const { return along_q * along_k; }
};

// The first element of one head of one batch entry.
__device__ __forceinline__ uint16_t* head_of(const Tensor& tensor, int b, int h) {
  return static_cast<uint16_t*>(tensor.data) + b * tensor.batch_stride + h * tensor.head_stride;
}

}  // namespace jfa

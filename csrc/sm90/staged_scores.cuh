// A bias or a mask that TMA brings: what forward and backward share of it.
#pragma once

#include "common/fragment.cuh"
#include "sm90/shared_matrix.cuh"
#include "sm90/tensor_map.h"
#include "sm90/tiles.h"

namespace jfa::sm90 {

// Host: boxes of `rows` queries, of a bias 64 keys, of a mask `keys` of them. Call it where staged_scores() has
// something.
inline Status make_staged_map(TensorMap& map, const Problem& p, int rows, int keys) {
  const bool is_mask = staged_scores(p) == StagedScores::kMask;
  const ScoreTensor& t = is_mask ? p.scores.mask : p.scores.bias;
  const int64_t plane = int64_t(t.q_len) * t.k_len;
  const Tensor planes = {t.data, t.heads * plane, t.k_len, plane};
  return make_tensor_map(map, planes, t.type, t.k_len, t.q_len, t.heads, t.batch, rows, is_mask ? keys : kRowBytes);
}

// Stands for a StagedReader in kernels to which TMA brings neither.
struct NothingStaged {
  template <class... Arguments>
  __device__ __forceinline__ explicit NothingStaged(const Arguments&...) {}
  __device__ __forceinline__ static constexpr bool adds() { return false; }
  __device__ __forceinline__ static constexpr bool hides() { return false; }
  __device__ __forceinline__ static void load_ahead() {}
  template <int kCols>
  __device__ __forceinline__ static void add(Fragment<2, kCols>&) {}
  template <int kCols>
  __device__ __forceinline__ static void hide(Fragment<2, kCols>&) {}
};

}  // namespace jfa::sm90

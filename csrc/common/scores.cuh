// From products q.k to masked scores. Two forms, chosen at compile time:
//   plain    scores stay raw products; the scale is folded into the exponent: p = 2^(s factor - m factor)
//   general  scores are brought to log2 units first: s = (scale q.k + bias) log2(e), and factor is 1
// Masks are selects of -inf and come last, so nothing that is masked, NaN included, survives.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/sequence.cuh"

namespace jfa {

__device__ __forceinline__ float load_as_float(const ScoreTensor& tensor, int64_t index) {
  switch (tensor.type) {
    case ElementType::kHalf:
      return __half2float(load_global(static_cast<const __half*>(tensor.data) + index));
    case ElementType::kBfloat16:
      return __bfloat162float(load_global(static_cast<const __nv_bfloat16*>(tensor.data) + index));
    case ElementType::kFloat:
      return load_global(static_cast<const float*>(tensor.data) + index);
    case ElementType::kBool:
      return load_global(static_cast<const uint8_t*>(tensor.data) + index) != 0 ? 1.0f : 0.0f;
  }
  return 0.0f;
}

// The scores of one batch entry and head.
template <bool kGeneral>
struct ScoreRule {
  float scale;        // of q.k, natural units
  float factor_log2;  // from a score as apply() leaves it to log2 units
  const ScoreTensor& bias;
  const ScoreTensor& mask;
  int64_t bias_origin, mask_origin;

  __device__ __forceinline__ ScoreRule(const Scores& scores, int b, int h) : bias(scores.bias), mask(scores.mask) {
    scale = scores.scale;
    if constexpr (kGeneral) {
      if (scores.device_scale != nullptr) scale = load_global(scores.device_scale + b * scores.device_scale_stride);
      bias_origin = b * bias.batch_stride + h * bias.head_stride;
      mask_origin = b * mask.batch_stride + h * mask.head_stride;
    }
    factor_log2 = kGeneral ? 1.0f : scale * kLog2e;
  }

  // `all` is the interval of keys that no row of the fragment masks; [begin, end) the keys of the tile.
  __device__ __forceinline__ static bool needs_mask(Interval all, int begin, int end) {
    return kGeneral || begin < all.begin || end > all.end;
  }

  // Products to scores, in place. Call it where needs_mask() holds.
  template <int kRows, int kCols>
  __device__ __forceinline__ void apply(Fragment<kRows, kCols>& s, const Position<>& at,
                                        const Sequence& sequence) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = opaque(at.row(r));
      const Interval keys = sequence.keys(i);
      const int64_t bias_row = kGeneral ? bias_origin + i * bias.q_stride : 0;
      const int64_t mask_row = kGeneral ? mask_origin + i * mask.q_stride : 0;
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const int j = at.col(c);
        bool visible = keys.contains(j);
        if constexpr (kGeneral) {
          float score = multiply(s.v[r][c], scale * kLog2e);
          if (visible && bias.data != nullptr) {
            score = fmaf(kLog2e, load_as_float(bias, bias_row + j * bias.k_stride), score);
          }
          if (visible && mask.data != nullptr) visible = load_as_float(mask, mask_row + j * mask.k_stride) != 0.0f;
          s.v[r][c] = score;
        }
        s.v[r][c] = visible ? s.v[r][c] : minus_infinity();
      }
    }
  }
};

}  // namespace jfa

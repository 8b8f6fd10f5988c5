// From products q.k to masked scores. Two forms, chosen at compile time:
//   plain    scores stay raw products; the scale is folded into the exponent: p = 2^(s factor - m factor)
//   general  scores are brought to log2 units first: s = (scale q.k + bias) log2(e), and factor is 1
// Masks are selects of -inf and come last, so nothing that is masked, NaN included, survives.
#pragma once

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/sequence.cuh"

namespace jfa {

// One element of a score tensor, and two neighbours along the keys.
template <class T>
struct ScoreElement;

template <>
struct ScoreElement<__half> {
  __device__ __forceinline__ static float one(const __half* p) { return __half2float(load_global(p)); }
  __device__ __forceinline__ static float2 two(const __half* p) {
    return unpack<__half>(load_global(reinterpret_cast<const uint32_t*>(p)));
  }
};
template <>
struct ScoreElement<__nv_bfloat16> {
  __device__ __forceinline__ static float one(const __nv_bfloat16* p) { return __bfloat162float(load_global(p)); }
  __device__ __forceinline__ static float2 two(const __nv_bfloat16* p) {
    return unpack<__nv_bfloat16>(load_global(reinterpret_cast<const uint32_t*>(p)));
  }
};
template <>
struct ScoreElement<float> {
  __device__ __forceinline__ static float one(const float* p) { return load_global(p); }
  __device__ __forceinline__ static float2 two(const float* p) {
    return load_global(reinterpret_cast<const float2*>(p));
  }
};
template <>
struct ScoreElement<bool> {
  __device__ __forceinline__ static float one(const bool* p) {
    return load_global(reinterpret_cast<const uint8_t*>(p)) != 0 ? 1.0f : 0.0f;
  }
  __device__ __forceinline__ static float2 two(const bool* p) {
    const uint16_t both = load_global(reinterpret_cast<const uint16_t*>(p));
    return {(both & 0xff) != 0 ? 1.0f : 0.0f, both >> 8 != 0 ? 1.0f : 0.0f};
  }
};

// Calls combine(score, element) for every score of a fragment that its row sees.
template <class T, int kRows, int kCols, class Combine>
__device__ __forceinline__ void for_each_element(Fragment<kRows, kCols>& s, const Position<>& at,
                                                 const Sequence& sequence, const ScoreTensor& tensor, int64_t origin,
                                                 const Combine& combine) {
  using Element = ScoreElement<T>;
  const T* data = static_cast<const T*>(tensor.data) + origin;
  // A thread's columns come in pairs. Where rows are even in length and in their beginnings, no pair crosses an end.
  const bool in_pairs = tensor.k_stride == 1 && tensor.k_len % 2 == 0 && tensor.q_stride % 2 == 0 &&
                        at.first_col % 2 == 0 && reinterpret_cast<uintptr_t>(data) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = opaque(at.row(r));
    const Interval keys = sequence.keys(i);
    const T* row = data + i * tensor.q_stride;
    if (in_pairs) {
#pragma unroll
      for (int c = 0; c < kCols; c += 2) {
        const int j = at.col(c);
        if (j >= keys.end || j + 1 < keys.begin) continue;
        const float2 pair = Element::two(row + j);
        s.v[r][c] = combine(s.v[r][c], pair.x);
        s.v[r][c + 1] = combine(s.v[r][c + 1], pair.y);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        const int j = at.col(c);
        if (keys.contains(j)) s.v[r][c] = combine(s.v[r][c], Element::one(row + j * tensor.k_stride));
      }
    }
  }
}

// The same for a transposed fragment: its rows are keys, its columns queries. Lanes of a quad then read from different
// rows of the tensor, one element at a time.
template <class T, int kRows, int kCols, class Combine>
__device__ __forceinline__ void for_each_element_transposed(Fragment<kRows, kCols>& s, const Position<>& at,
                                                            const Sequence& sequence, const ScoreTensor& tensor,
                                                            int64_t origin, const Combine& combine) {
  const T* data = static_cast<const T*>(tensor.data) + origin;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int j = opaque(at.row(r));
    const Interval rows = sequence.rows_of_keys(j, j + 1);
    const T* column = data + j * tensor.k_stride;
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const int i = at.col(c);
      if (rows.contains(i)) s.v[r][c] = combine(s.v[r][c], ScoreElement<T>::one(column + i * tensor.q_stride));
    }
  }
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
    factor_log2 = factor_of(scores);
  }
  __device__ __forceinline__ static float factor_of(const Scores& scores) {
    return kGeneral ? 1.0f : scores.scale * kLog2e;
  }

  // `all` is the interval of keys that no row of the fragment masks; [begin, end) the keys of the tile.
  __device__ __forceinline__ static bool needs_mask(Interval all, int begin, int end) {
    return kGeneral || begin < all.begin || end > all.end;
  }

  // Products to scores, in place. Call it where needs_mask() holds.
  template <int kRows, int kCols>
  __device__ __forceinline__ void apply(Fragment<kRows, kCols>& s, const Position<>& at,
                                        const Sequence& sequence) const {
    scale_bias_and_mask<false>(s, at, sequence);
#pragma unroll
    for (int r = 0; r < kRows; ++r) hide_outside(s, r, at, sequence.keys(opaque(at.row(r))));
  }

  // The same of S^T: rows of the fragment are keys, columns queries. needs_mask() then compares intervals of queries.
  template <int kRows, int kCols>
  __device__ __forceinline__ void apply_transposed(Fragment<kRows, kCols>& s, const Position<>& at,
                                                   const Sequence& sequence) const {
    scale_bias_and_mask<true>(s, at, sequence);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = opaque(at.row(r));
      hide_outside(s, r, at, sequence.rows_of_keys(j, j + 1));
    }
  }

 private:
  // Keeps of one row the columns of an interval.
  template <int kRows, int kCols>
  __device__ __forceinline__ static void hide_outside(Fragment<kRows, kCols>& s, int r, const Position<>& at,
                                                      const Interval& visible) {
    // Relative to this thread's first column: what is compared with them are then constants.
    const int begin = visible.begin - at.first_col;
    const int end = visible.end - at.first_col;
#pragma unroll
    for (int c = 0; c < kCols; ++c) s.v[r][c] = Position<>::col_offset(c) < end ? s.v[r][c] : minus_infinity();
    if (begin <= 0) return;  // of keys, only windows have an edge there
#pragma unroll
    for (int c = 0; c < kCols; ++c) s.v[r][c] = Position<>::col_offset(c) >= begin ? s.v[r][c] : minus_infinity();
  }

  template <bool kTransposed, int kRows, int kCols>
  __device__ __forceinline__ void scale_bias_and_mask(Fragment<kRows, kCols>& s, const Position<>& at,
                                                      const Sequence& sequence) const {
    if constexpr (kGeneral) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kCols; ++c) s.v[r][c] = multiply(s.v[r][c], scale * kLog2e);
      }
      const auto add = [](float score, float element) { return fmaf(kLog2e, element, score); };
      if (bias.data == nullptr) {
      } else if (bias.type == ElementType::kFloat) {
        with_elements<float, kTransposed>(s, at, sequence, bias, bias_origin, add);
      } else if (bias.type == ElementType::kHalf) {
        with_elements<__half, kTransposed>(s, at, sequence, bias, bias_origin, add);
      } else {
        with_elements<__nv_bfloat16, kTransposed>(s, at, sequence, bias, bias_origin, add);
      }
      if (mask.data != nullptr) {
        with_elements<bool, kTransposed>(s, at, sequence, mask, mask_origin, [](float score, float element) {
          return element != 0.0f ? score : minus_infinity();
        });
      }
    }
  }
  template <class T, bool kTransposed, int kRows, int kCols, class Combine>
  __device__ __forceinline__ static void with_elements(Fragment<kRows, kCols>& s, const Position<>& at,
                                                       const Sequence& sequence, const ScoreTensor& tensor,
                                                       int64_t origin, const Combine& combine) {
    if constexpr (kTransposed) {
      for_each_element_transposed<T>(s, at, sequence, tensor, origin, combine);
    } else {
      for_each_element<T>(s, at, sequence, tensor, origin, combine);
    }
  }
};

}  // namespace jfa

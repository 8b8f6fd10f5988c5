// Who sees whom in one batch entry. Causality, windows, lengths and alignment are one fact: each query row sees one
// interval of keys. Loop bounds and masks are both derived from it here, so they cannot disagree.
#pragma once

#include "common/device.cuh"
#include "problem.h"

namespace jfa {

struct Interval {
  int begin, end;

  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ bool contains(int x) const { return begin <= x && x < end; }
};

struct Sequence {
  int q_len, k_len;          // of this batch entry, not the padded extents
  int offset;                // row i sits at key position i + offset
  int first_key, past_keys;  // what row 0 would see of keys without end: row i sees [i + first_key, i + past_keys)

  __device__ __forceinline__ Sequence(const Visibility& visibility, int q_len_, int k_len_)
      : q_len(q_len_), k_len(k_len_) {
    offset = visibility.bottom_right ? k_len - q_len : 0;
    first_key = offset - min(visibility.window_left, kMaxSequence);
    past_keys = offset + min(visibility.window_right, kMaxSequence) + 1;
  }
  __device__ __forceinline__ Sequence(const Problem& p, int b)
      : Sequence(p.visibility, length(p.visibility.q_lengths, b, p.shape.q_len),
                 length(p.visibility.k_lengths, b, p.shape.k_len)) {}

  // How far key j is past row i's own position.
  __device__ __forceinline__ int distance(int i, int j) const { return j - i - offset; }

  // Keys that row i sees.
  __device__ __forceinline__ Interval keys(int i) const {
    return {max(0, i + first_key), i < q_len ? min(k_len, i + past_keys) : 0};
  }

  // Keys that some row of [begin, end) sees.
  __device__ __forceinline__ Interval keys_of_rows(int begin, int end) const {
    return {keys(begin).begin, begin < q_len ? keys(min(end, q_len) - 1).end : 0};
  }

  // Keys that every row of [begin, end) below q_len sees: a tile inside needs no mask.
  __device__ __forceinline__ Interval keys_of_all_rows(int begin, int end) const {
    return {keys(min(end, q_len) - 1).begin, keys(begin).end};
  }

  // Rows that see some key of [begin, end).
  __device__ __forceinline__ Interval rows_of_keys(int begin, int end) const {
    return {max(0, begin - past_keys + 1), begin < k_len ? min(q_len, min(end, k_len) - first_key) : 0};
  }

  // Rows that see every key of [begin, end).
  __device__ __forceinline__ Interval rows_of_all_keys(int begin, int end) const {
    return {rows_of_keys(end - 1, end).begin, end <= k_len ? rows_of_keys(begin, begin + 1).end : 0};
  }

 private:
  __device__ __forceinline__ static int length(const int* lengths, int b, int extent) {
    return lengths == nullptr ? extent : min(max(load_global(lengths + b), 0), extent);
  }
};

}  // namespace jfa

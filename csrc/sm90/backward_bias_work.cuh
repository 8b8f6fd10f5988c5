// What the roles of the Hopper kernel for the gradient of a bias share: the arguments, the picture of shared memory,
// the work of a block, and the bias that a warpgroup keeps beside it.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/fragment.cuh"
#include "common/math.cuh"
#include "common/sequence.cuh"
#include "sm90/backward_bias_tiles.h"
#include "sm90/pipeline.cuh"
#include "sm90/shared_matrix.cuh"

namespace jfa::sm90 {

struct BackwardBiasArguments {
  TensorMap q, d_o, k, v;
  Problem p;
  Gradients g;
  int items, along_q, along_k;  // tiles: of the gradient, and of one of its planes
  bool in_pairs;                // two neighbours of a row, of the bias and of the gradient, are one access
};

template <class Shape>
struct BackwardBiasSmem {
  struct Place {  // 64 columns of Q and K, or of dO and V
    Tile<Shape::kQ, kChunkCols> rows;
    Tile<Shape::kK, kChunkCols> keys;
  };
  static constexpr int kWords = Shape::kBiasBytes / 16;

  Place ring[Shape::kPlaces];
  uint4 bias[kWords > 0 ? kWords : 1];
  uint64_t full[Shape::kPlaces], free[Shape::kPlaces];
};

// A tile of the gradient.
struct BiasItem {
  int batch, head;  // of the bias
  int first_row, first_key;
};

// Tiles along the keys are neighbours in time: they share Q and dO.
template <class Shape>
__device__ __forceinline__ BiasItem bias_item(const BackwardBiasArguments& a, int number) {
  const int rest = number / a.along_k, plane = rest / a.along_q;
  return {plane / a.g.d_bias.heads, plane % a.g.d_bias.heads, rest % a.along_q * Shape::kClusterQ,
          number % a.along_k * Shape::kK};
}

// The steps of a block, the same for each of its roles: of every item in turn, those batch entries and heads whose rows
// look at the tile's keys. Their order is the order of summation.
template <class Shape>
class BiasSteps {
 public:
  int number;                // of the item
  int first_row, first_key;  // of the item, rows of the whole cluster
  int b, h;                  // of the step
  bool first;                // step of its item

  __device__ __forceinline__ explicit BiasSteps(const BackwardBiasArguments& a)
      : number(block_index() / Shape::kCluster - workers()), a_(a) {}

  // Goes on to the next step; false: there is none. Calls nothing_seen(item) for each item without any.
  template <class NothingSeen>
  __device__ __forceinline__ bool next(const NothingSeen& nothing_seen) {
    first = false;
    if (number >= 0) {
      if (a_.g.d_bias.heads == 1 && ++h < a_.p.shape.heads) return true;
      if (a_.g.d_bias.batch == 1) {
        ++b;
        if (a_.g.d_bias.heads == 1) h = 0;
        if (find_entry()) return true;
      }
    }
    first = true;
    for (number += workers(); number < a_.items; number += workers()) {
      const BiasItem item = bias_item<Shape>(a_, number);
      first_row = item.first_row;
      first_key = item.first_key;
      b = item.batch;
      h = item.head;
      if (find_entry()) return true;
      nothing_seen(item);
    }
    return false;
  }

 private:
  const BackwardBiasArguments& a_;

  __device__ __forceinline__ static int workers() { return grid_blocks() / Shape::kCluster; }

  // The batch entry from b on, among those that share the bias, of which some row of the cluster looks at a key.
  __device__ __forceinline__ bool find_entry() {
    for (; b < a_.p.shape.batch; ++b) {
      const Sequence sequence(a_.p, b);
      const Interval keys = sequence.keys_of_rows(first_row, first_row + Shape::kClusterQ);
      if (first_key < keys.end && (first_key + Shape::kK > keys.begin || first_key < sequence.sink_keys())) return true;
      if (a_.g.d_bias.batch > 1) return false;
    }
    return false;
  }
};

// This thread's part of a tile of the bias, kept in shared memory as it is, in pieces of 16 bytes: nobody else reads
// it.
template <class Shape>
struct KeptBias {
  static constexpr int kCols = Shape::kK / 4;               // of the fragment
  static constexpr int kPiece = 16 / Shape::kElementBytes;  // elements, in the order of the fragment's registers
  static constexpr int kPieces = 2 * kCols / kPiece;
  static constexpr int kThreads = Shape::kWarpgroups * kWarpgroupThreads;
  static_assert(2 * kCols % kPiece == 0, "a thread's part is whole pieces");

  const BackwardBiasArguments& a;
  const BackwardBiasSmem<Shape>& smem;

  // What lies outside the bias becomes zeros: it is hidden.
  __device__ __forceinline__ void load(int b, int h, const Position<>& at) const {
    if (a.in_pairs) {
      load_rows<true>(b, h, at);
    } else {
      load_rows<false>(b, h, at);
    }
  }

  // As ScoreRule wants it.
  __device__ __forceinline__ static constexpr bool adds() { return true; }
  __device__ __forceinline__ static constexpr bool hides() { return false; }
  __device__ __forceinline__ static void hide(Fragment<2, kCols>&) {}
  __device__ __forceinline__ void add(Fragment<2, kCols>& s) const {
    if constexpr (Shape::kElementBytes == 4) {
#pragma unroll
      for (int n = 0; n < kPieces; ++n) {
        const float4 x = load_shared_f32x4(address(n));
        add_at(s, 4 * n, float2{x.x, x.y});
        add_at(s, 4 * n + 2, float2{x.z, x.w});
      }
    } else if (a.p.scores.bias.type == ElementType::kHalf) {
      add_as<__half>(s);
    } else {
      add_as<__nv_bfloat16>(s);
    }
  }

 private:
  __device__ __forceinline__ uint32_t address(int piece) const {
    return shared_address(smem.bias) + (piece * kThreads + thread_index() - kWarpgroupThreads) * 16;
  }
  // Of the fragment's n-th register and the next.
  __device__ __forceinline__ static void add_at(Fragment<2, kCols>& s, int n, const float2& pair) {
    float* score = &s.v[n / kCols][n % kCols];
    score[0] = fmaf(kLog2e, pair.x, score[0]);
    score[1] = fmaf(kLog2e, pair.y, score[1]);
  }
  template <class Element>
  __device__ __forceinline__ void add_as(Fragment<2, kCols>& s) const {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const uint4 x = load_shared_128(address(n));
      add_at(s, 8 * n, unpack<Element>(x.x));
      add_at(s, 8 * n + 2, unpack<Element>(x.y));
      add_at(s, 8 * n + 4, unpack<Element>(x.z));
      add_at(s, 8 * n + 6, unpack<Element>(x.w));
    }
  }
  template <bool kInPairs>
  __device__ __forceinline__ void load_rows(int b, int h, const Position<>& at) const {
    using Element = std::conditional_t<Shape::kElementBytes == 4, uint32_t, uint16_t>;
    using Pair = std::conditional_t<Shape::kElementBytes == 4, uint2, uint32_t>;
    const ScoreTensor& bias = a.p.scores.bias;
    alignas(16) Element x[2 * kCols];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = opaque(at.row(r));
      const Element* row = static_cast<const Element*>(bias.data) + b * bias.batch_stride + h * bias.head_stride +
                           i * bias.q_stride + at.first_col;
      const int cols = i < bias.q_len ? bias.k_len - at.first_col : 0;
#pragma unroll
      for (int c = 0; c < kCols; c += 2) {
        const int col = Position<>::col_offset(c);
        if constexpr (kInPairs) {
          const Pair pair = col < cols ? load_global(reinterpret_cast<const Pair*>(row + col)) : Pair{};
          memcpy(x + r * kCols + c, &pair, sizeof(pair));
        } else {
          x[r * kCols + c] = col < cols ? load_global(row + col) : 0;
          x[r * kCols + c + 1] = col + 1 < cols ? load_global(row + col + 1) : 0;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      uint4 words;
      memcpy(&words, x + n * kPiece, sizeof(words));
      store_shared_128(address(n), words);
    }
  }
};

}  // namespace jfa::sm90

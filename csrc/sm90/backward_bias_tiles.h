// The shapes that the kernel for the gradient of a bias is compiled in, and the one function that chooses among them.
#pragma once

#include "dispatch.h"
#include "sm90/tiles.h"

namespace jfa::sm90 {

// Where the kernel finds the bias that it adds to scores again.
enum class BiasPlace {
  kShared16,  // in shared memory, read once for a tile of the gradient: words of 16 bits
  kShared32,  // the same of 32 bits
  kMemory,    // in device memory, where the mask is too
};

// A block has one warpgroup that loads, and kWarpgroups that compute, each 64 query rows by kK keys of the gradient.
// The blocks of a cluster own neighbouring rows and the same keys: each loads its share of keys and values into both.
// S and dP are products over chunks of 64 columns: what a ring's place holds is such a chunk of all rows and all keys,
// whatever the head dim.
template <int kHeadDim_, int kValueDim_, int kK_, int kCluster_, BiasPlace kBias_>
struct BackwardBiasTile : TileReads<kVisibility | (kBias_ == BiasPlace::kMemory ? kScoreTensors : kNothing)> {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kWarpgroups = 2;
  static constexpr int kQ = kWarpgroups * kWarpgroupRows;
  static constexpr int kK = kK_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kClusterQ = kCluster * kQ;  // rows of one item
  static constexpr BiasPlace kBias = kBias_;
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroupThreads;

  // As in ForwardTile.
  static constexpr int kLoadRegisters = kCluster == 2 ? 40 : 24;
  static constexpr int kComputeRegisters = kCluster == 2 ? 232 : 240;
  static_assert(kLoadRegisters + kWarpgroups * kComputeRegisters <= 65536 / kThreads / 8 * 8 * (kWarpgroups + 1),
                "the warpgroups of a block do not have that many registers together");

  static constexpr int kHeadChunks = (kHeadDim + 63) / 64;
  static constexpr int kValueChunks = (kValueDim + 63) / 64;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kPlaceBytes = 2 * 64 * (kQ + kK);
  static constexpr int kElementBytes = kBias == BiasPlace::kMemory ? 0 : kBias == BiasPlace::kShared16 ? 2 : 4;
  static constexpr int kBiasBytes = kQ * kK * kElementBytes;
  static constexpr int kPlaces = (kSharedMemoryLimit - kBarrierBytes - kBiasBytes) / kPlaceBytes;
  static constexpr int kSharedBytes = kBarrierBytes + kBiasBytes + kPlaces * kPlaceBytes;
  // Whether a warpgroup may wait for all chunks of S and dP while it keeps the other one waiting: not where they do not
  // fit the ring together, since the other one has to give places back.
  static constexpr bool kTakesTurns = kHeadChunks + kValueChunks <= kPlaces;
};

template <int kHeadDim, int kValueDim>
struct BackwardBiasTiles {
  using Narrow = BackwardBiasTile<kHeadDim, kValueDim, 112, 2, BiasPlace::kShared16>;
  using Wide = BackwardBiasTile<kHeadDim, kValueDim, 112, 2, BiasPlace::kShared32>;
  using Reading = BackwardBiasTile<kHeadDim, kValueDim, 64, 1, BiasPlace::kMemory>;
};

// Whether this family computes the gradient of a call's bias: a block sums what is broadcast along batch entries and
// heads. Along queries or keys it would be all of a row or column of tiles, and few blocks: the portable kernel's
// smaller tiles are more.
inline bool has_bias_tiles(const Problem& p) {
  const ScoreTensor& bias = p.scores.bias;
  return bias.q_len > 1 && bias.k_len > 1 && p.shape.batch > 0 && p.shape.heads > 0;
}

// Tiles of one plane of the bias, and of all its planes.
template <class Tile>
struct BiasItems {
  int along_q, along_k;
  int64_t count;

  BiasItems(const Problem& p)
      : along_q((p.shape.q_len + Tile::kClusterQ - 1) / Tile::kClusterQ),
        along_k((p.shape.k_len + Tile::kK - 1) / Tile::kK),
        count(int64_t(p.scores.bias.batch) * p.scores.bias.heads * along_q * along_k) {}
};

// Calls f(Type<BackwardBiasTile<...>>) with the tile that a call runs.
template <int kHeadDim, class F>
auto with_backward_bias_tile(const Problem& p, F&& f) {
  const auto with_value_dim = [&](auto value_dim) {
    using Tiles = BackwardBiasTiles<kHeadDim, value_dim.value>;
    // Beside sums of 128 keys there are no registers left for a mask's elements or random bits.
    if (p.scores.mask.data != nullptr || p.scores.dropout.seeds != nullptr) return f(Type<typename Tiles::Reading>{});
    if (p.scores.bias.type == ElementType::kFloat) return f(Type<typename Tiles::Wide>{});
    return f(Type<typename Tiles::Narrow>{});
  };
  if constexpr (kHeadDim == 192) {
    if (p.shape.value_dim <= 128) return with_value_dim(std::integral_constant<int, 128>{});
  }
  return with_value_dim(std::integral_constant<int, kHeadDim>{});
}

}  // namespace jfa::sm90

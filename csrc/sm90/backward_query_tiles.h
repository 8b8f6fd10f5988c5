// The shapes that the kernel for dQ is compiled in, and the one function that chooses among them.
#pragma once

#include "dispatch.h"
#include "sm90/tiles.h"

namespace jfa::sm90 {

// A block has one warpgroup that loads, and two that compute, each 64 query rows. Tiles of kK keys, and of their
// values, have rings of kKeyPlaces and kValuePlaces. A tile of keys is needed until the scores of the next one have
// been issued: two places are the least for them, for values one.
template <int kHeadDim_, int kValueDim_, int kK_, int kKeyPlaces_, int kValuePlaces_, unsigned kReads = kNothing>
struct BackwardQueryTile : TileReads<kReads> {
  using Seeing = BackwardQueryTile<kHeadDim_, kValueDim_, kK_, kKeyPlaces_, kValuePlaces_, kReads | kVisibility>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kWarpgroups = 2;
  static constexpr int kQ = kWarpgroups * kWarpgroupRows;
  static constexpr int kClusterQ = kQ;  // rows of one item
  static constexpr int kK = kK_;
  static constexpr int kKeyPlaces = kKeyPlaces_;
  static constexpr int kValuePlaces = kValuePlaces_;
  static_assert(kKeyPlaces >= 2, "the keys of one tile are read while those of the next are");
  // For a tile of values that is to make room for the next one soon. Where there are more places it costs 5 to 7 %.
  static constexpr bool kTwoTurns = kValuePlaces == 1;
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroupThreads;

  // Registers of a thread, as in ForwardTile.
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoadRegisters = 24;
  static constexpr int kComputeRegisters = 240;
  static_assert(kLoadRegisters + kWarpgroups * kComputeRegisters <= (kWarpgroups + 1) * kStartRegisters,
                "the warpgroups of a block do not have that many registers together");

  static constexpr int kWideHeadDim = (kHeadDim + 63) / 64 * 64;  // in shared memory, in whole chunks of 64 columns
  static constexpr int kWideValueDim = (kValueDim + 63) / 64 * 64;
  static constexpr int kStagedBytes = TileReads<kReads>::kStagesScores ? 2 * kQ * ((kK + 63) / 64 * 64) : 0;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kSharedBytes = 2 * kQ * (kWideHeadDim + kWideValueDim) +
                                      2 * kK * (kKeyPlaces * kWideHeadDim + kValuePlaces * kWideValueDim) +
                                      kStagedBytes + kBarrierBytes;
};

// Some may be dropped too.
template <int kHeadDim, int kValueDim, int kK, int kKeyPlaces, int kValuePlaces>
using StagingQueryTile =
    BackwardQueryTile<kHeadDim, kValueDim, kK, kKeyPlaces, kValuePlaces, kVisibility | kStagedScores | kAnyDropout>;

// For each pair of head dim and value dim, those above 128; Seeing: any visibility, plain scores. Figures are TFLOP/s
// of the whole backward (10 b h s^2 d) as if this kernel alone made it, on an H200, 16384 tokens x 2048 columns in all,
// 4k, full and causal, against the next best tile tried. With general scores a thread holds its part of a tile's bias
// as well.
template <int kHeadDim, int kValueDim>
struct BackwardQueryTiles;

template <>
struct BackwardQueryTiles<192, 128> {
  using Plain = BackwardQueryTile<192, 128, 64, 4, 3>;  // with dK and dV 545, 510 (80 keys: 541, 504)
  using Seeing = Plain::Seeing;
  using General = Seeing;
  using Staging = StagingQueryTile<192, 128, 64, 3, 2>;
  using Reading = BackwardQueryTile<192, 128, 48, 4, 4, kVisibility | kScoreTensors>;
};
template <>
struct BackwardQueryTiles<192, 192> {
  using Plain = BackwardQueryTile<192, 192, 64, 3, 2>;  // with dK and dV 464, 425 (80 keys: 432, 400)
  using Seeing = Plain::Seeing;
  using General = Seeing;
  using Staging = StagingQueryTile<192, 192, 64, 3, 1>;  // bias: 869, 769 (2 and 2 places: 832, 737)
  using Reading = BackwardQueryTile<192, 192, 48, 3, 3, kVisibility | kScoreTensors>;
};
template <>
struct BackwardQueryTiles<256, 256> {
  using Plain = BackwardQueryTile<256, 256, 64, 2, 1>;  // 1163, 1025 (one turn: 986, 928; 48 keys: 955, 881)
  using Seeing = Plain::Seeing;
  using General = BackwardQueryTile<256, 256, 48, 3, 1, kVisibility>;  // soft cap: 941, 874 (2 and 2: 869, 821)
  using Staging = StagingQueryTile<256, 256, 48, 2, 1>;
  using Reading = BackwardQueryTile<256, 256, 32, 3, 3, kVisibility | kScoreTensors>;
};

// Calls f(Type<BackwardQueryTile<...>>, std::bool_constant) with the tile that a call runs, and whether scores are
// general.
template <int kHeadDim, class F>
auto with_backward_query_tile(const Problem& p, F&& f) {
  const auto with_value_dim = [&](auto value_dim) {
    using Tiles = BackwardQueryTiles<kHeadDim, value_dim.value>;
    if (staged_scores(p) != StagedScores::kNothing) return f(Type<typename Tiles::Staging>{}, std::true_type{});
    // Larger tiles spill with dropout in them.
    if (reads_scores(p.scores) || p.scores.dropout.seeds != nullptr) {
      return f(Type<typename Tiles::Reading>{}, std::true_type{});
    }
    if (is_general(p.scores)) return f(Type<typename Tiles::General>{}, std::true_type{});
    if (reads_visibility_backward(p)) return f(Type<typename Tiles::Seeing>{}, std::false_type{});
    return f(Type<typename Tiles::Plain>{}, std::false_type{});
  };
  if constexpr (kHeadDim == 192) {
    if (p.shape.value_dim <= 128) return with_value_dim(std::integral_constant<int, 128>{});
  }
  return with_value_dim(std::integral_constant<int, kHeadDim>{});
}

}  // namespace jfa::sm90

// The shapes of the backward for wide heads, the one function that chooses among them, and the order of its work.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "sm90/tiles.h"

namespace jfa::sm90 {

// A block has one warpgroup that loads and two that compute: one dV, the other dK, of the same kKeys keys, a step of kQ
// query rows at a time. dO has kStages places; Q, which is read first by the one and last by the other, has as many or
// kMoreQueries more.
//
// The two blocks of a cluster work on neighbouring key tiles of one head. Each loads half of every tile of Q and dO
// into both, which halves what the multiprocessors read from the L2.
template <int kHeadDim_, int kValueDim_, int kQ_, int kStages_, int kCluster_ = 1, int kHeldSteps_ = 0,
          unsigned kReads = kNothing, int kMoreQueries_ = 0>
struct BackwardWideTile : TileReads<kReads> {
  using Seeing = BackwardWideTile<kHeadDim_, kValueDim_, kQ_, kStages_, kCluster_, kHeldSteps_, kReads | kVisibility,
                                  kMoreQueries_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kStages = kStages_, kQueryStages = kStages_ + kMoreQueries_;
  static constexpr int kCluster = kCluster_;
  static_assert(kCluster == 1 || kCluster == 2, "a cluster has one block or two");
  static constexpr int kKeys = kWarpgroupRows;
  static constexpr int kClusterKeys = kCluster * kKeys;  // of one item
  static constexpr int kQ = kQ_;
  static_assert(kQ % 32 == 0, "the lanes of a warp load the statistics of as many rows each");
  static constexpr int kPlaces = 2;  // for probabilities, on their way from one warpgroup to the other
  static_assert(kHeadDim % 64 == 0 && kValueDim % 64 == 0, "heads have whole chunks of 64 columns");
  // So many steps of 16 columns of K and of V are held in registers. A product of 64 x 32 x 16 whose operands both lie
  // in shared memory reads 3 KB of it, at 128 bytes a cycle, in the time of 16 cycles; with K in registers 1 KB.
  static constexpr int kHeldSteps = kHeldSteps_;
  static constexpr int kThreads = 3 * kWarpgroupThreads;

  // Registers of a thread, as in ForwardTile.
  static constexpr int kLoadRegisters = kCluster == 2 ? 40 : 24;
  static constexpr int kComputeRegisters = kCluster == 2 ? 232 : 240;
  static_assert(kLoadRegisters + 2 * kComputeRegisters <= 3 * (65536 / kThreads / 8 * 8),
                "the warpgroups of a block do not have that many registers together");

  static constexpr int kTileBytes =
      2 * (kKeys * (kHeadDim + kValueDim) + kQ * (kQueryStages * kHeadDim + kStages * kValueDim));
  static constexpr int kProbabilityBytes = kPlaces * kKeys * kQ * 4;
  // In whole units of what tiles are aligned to, and so the picture of shared memory.
  static constexpr int kStatisticBytes = ((kQueryStages + kStages) * kQ * 4 + 1023) / 1024 * 1024;
  static constexpr int kStagedBytes = TileReads<kReads>::kStagesScores ? 2 * kQueryStages * kQ * kKeys : 0;
  static constexpr int kBarrierBytes = 1024;  // with the items
  static constexpr int kSharedBytes = kTileBytes + kProbabilityBytes + kStatisticBytes + kStagedBytes + kBarrierBytes;
};

// Some may be dropped too.
template <int kHeadDim, int kValueDim, int kQ, int kStages, int kHeldSteps>
using StagingWideTile =
    BackwardWideTile<kHeadDim, kValueDim, kQ, kStages, 1, kHeldSteps, kVisibility | kStagedScores | kAnyDropout>;

// For each pair of head dim and value dim. Figures are TFLOP/s of the kernel's own four products on an H200, 16384
// tokens x 2048 columns in all, against the next best tile tried. General scores of 64 rows spill while they read a
// bias.
template <int kHeadDim, int kValueDim>
struct BackwardWideTiles;

template <>
struct BackwardWideTiles<192, 128> {
  // With prepare_backward, as whole backwards: 931, causal 862 (as many places for Q as for dO: 918, 853).
  using Plain = BackwardWideTile<192, 128, 64, 3, 2, 12, kNothing, 1>;
  using General = Plain::Seeing;
  using Staging = StagingWideTile<192, 128, 64, 3, 0>;
  using Reading = BackwardWideTile<192, 128, 32, 8, 1, 0, kVisibility | kScoreTensors>;
};
template <>
struct BackwardWideTiles<192, 192> {
  using Plain = BackwardWideTile<192, 192, 64, 3, 2, 12>;  // 4k: 603 (held 0: 572), causal: 567 (488), before clusters
  using General = BackwardWideTile<192, 192, 64, 3, 1, 6, kVisibility>;
  using Staging = StagingWideTile<192, 192, 32, 5, 4>;  // bias: 358 (64 queries, 2 stages: 315)
  using Reading = BackwardWideTile<192, 192, 32, 6, 1, 0, kVisibility | kScoreTensors>;
};
template <>
struct BackwardWideTiles<256, 256> {
  // 1k: 463 (no cluster, held 14: 449), 4k: 612 (598), 16k: 648 (629); causal 385 (371), 559 (563), 643 (640).
  // Held 0: 447, 531, 570; without a cluster 437, 513, 540. With one more place for Q +0 to 1 %.
  using Plain = BackwardWideTile<256, 256, 32, 4, 2, 12, kNothing, 1>;
  using General = BackwardWideTile<256, 256, 32, 4, 2, 8, kVisibility>;
  using Staging = StagingWideTile<256, 256, 32, 4, 0>;  // bias: 399 (cluster 395), causal 383 (374)
  using Reading = BackwardWideTile<256, 256, 32, 4, 1, 0, kVisibility | kScoreTensors>;
};

// Calls f(Type<BackwardWideTile<...>>, std::bool_constant) with the tile that a call runs, and whether scores are
// general.
template <int kHeadDim, class F>
auto with_backward_wide_tile(const Problem& p, F&& f) {
  const auto with_value_dim = [&](auto value_dim) {
    using Tiles = BackwardWideTiles<kHeadDim, value_dim.value>;
    if (staged_scores(p) != StagedScores::kNothing) return f(Type<typename Tiles::Staging>{}, std::true_type{});
    // Larger tiles spill with dropout in them.
    if (reads_scores(p.scores) || p.scores.dropout.seeds != nullptr) {
      return f(Type<typename Tiles::Reading>{}, std::true_type{});
    }
    if (is_general(p.scores)) return f(Type<typename Tiles::General>{}, std::true_type{});
    if (reads_visibility_backward(p)) return f(Type<typename Tiles::General>{}, std::false_type{});
    return f(Type<typename Tiles::Plain>{}, std::false_type{});
  };
  if constexpr (kHeadDim == 192) {
    if (p.shape.value_dim <= 128) return with_value_dim(std::integral_constant<int, 128>{});
  }
  return with_value_dim(std::integral_constant<int, kHeadDim>{});
}

inline WorkOrder backward_wide_order(const Problem& p, int key_tile) {
  const Shape& s = p.shape;
  constexpr int64_t kSectionBytes = 8 << 20;  // of queries and output gradients: 297 at d 256, causal 1k (32 MB: 289)
  constexpr int64_t kLeastHeads = 2;
  const int64_t heads = int64_t(s.kv_heads) * s.batch;
  const int64_t bytes = int64_t(s.heads / std::max(s.kv_heads, 1)) * s.q_len * (s.head_dim + s.value_dim) * 2;
  return work_order(p, heads, key_tiles(p, key_tile), tiles_sequences_backward(p),
                    bytes > 0 ? std::max(kSectionBytes / bytes, kLeastHeads) : heads);
}

}  // namespace jfa::sm90

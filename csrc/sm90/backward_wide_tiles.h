// The shapes of the backward for wide heads, the one function that chooses among them, and the order of its work.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "sm90/tiles.h"

namespace jfa::sm90 {

// A block has one warpgroup that loads and two that compute: one dV, the other dK, of the same kKeys keys, a step of kQ
// query rows at a time. Q and dO have kStages places each.
template <int kHeadDim_, int kValueDim_, int kQ_, int kStages_>
struct BackwardWideTile {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kStages = kStages_;
  static constexpr int kKeys = kWarpgroupRows;
  static constexpr int kQ = kQ_;
  static_assert(kQ % 32 == 0, "the lanes of a warp load the statistics of as many rows each");
  static constexpr int kPlaces = 2;  // for probabilities, on their way from one warpgroup to the other
  static_assert(kHeadDim % 64 == 0 && kValueDim % 64 == 0, "heads have whole chunks of 64 columns");
  static constexpr int kThreads = 3 * kWarpgroupThreads;

  // Registers of a thread, as in ForwardTile.
  static constexpr int kLoadRegisters = 24;
  static constexpr int kComputeRegisters = 240;
  static_assert(kLoadRegisters + 2 * kComputeRegisters <= 3 * (65536 / kThreads / 8 * 8),
                "the warpgroups of a block do not have that many registers together");

  static constexpr int kTileBytes = 2 * (kKeys + kStages * kQ) * (kHeadDim + kValueDim);
  static constexpr int kProbabilityBytes = kPlaces * kKeys * kQ * 4;
  static constexpr int kStatisticBytes = 2 * kStages * kQ * 4;
  static constexpr int kBarrierBytes = 1024;  // with the items
  static constexpr int kSharedBytes = kTileBytes + kProbabilityBytes + kStatisticBytes + kBarrierBytes;
};

// General scores of 64 rows spill while they read a bias, but for the narrowest pair of dims.
template <int kHeadDim, int kValueDim, bool kGeneral>
using BackwardWide =
    std::conditional_t<kGeneral && kHeadDim + kValueDim >= 384, BackwardWideTile<kHeadDim, kValueDim, 32, 4>,
                       BackwardWideTile<kHeadDim, kValueDim, 64, kHeadDim == 256 ? 2 : 3>>;

// Calls f(Type<BackwardWideTile<...>>, std::bool_constant) with the tile that a call runs, and whether scores are
// general.
template <int kHeadDim, class F>
auto with_backward_wide_tile(const Problem& p, F&& f) {
  const auto with_value_dim = [&](auto value_dim) {
    if (is_general(p.scores)) return f(Type<BackwardWide<kHeadDim, value_dim.value, true>>{}, std::true_type{});
    return f(Type<BackwardWide<kHeadDim, value_dim.value, false>>{}, std::false_type{});
  };
  if constexpr (kHeadDim == 192) {
    if (p.shape.value_dim <= 128) return with_value_dim(std::integral_constant<int, 128>{});
  }
  return with_value_dim(std::integral_constant<int, kHeadDim>{});
}

inline WorkOrder backward_wide_order(const Problem& p, int key_tile) {
  const Shape& s = p.shape;
  constexpr int64_t kSectionBytes = 32 << 20;  // of queries and output gradients
  const int64_t heads = int64_t(s.kv_heads) * s.batch;
  const int64_t bytes = int64_t(s.heads / std::max(s.kv_heads, 1)) * s.q_len * (s.head_dim + s.value_dim) * 2;
  return work_order(heads, (s.k_len + key_tile - 1) / key_tile, bytes > 0 ? kSectionBytes / bytes : heads);
}

}  // namespace jfa::sm90

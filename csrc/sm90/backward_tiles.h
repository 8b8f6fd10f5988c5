// The shapes the Hopper family's key-owning backward is compiled in, the one function that chooses among them, and the
// size of what it accumulates.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "problem.h"
#include "sm90/tiles.h"

namespace jfa::sm90 {

// How the warpgroups share a tile of dQ, kQ rows of kHeadDim.
enum class QueryShare {
  kRows,     // dQ = dS K: 64 rows each
  kColumns,  // dQ^T = K^T dS^T: 64 columns each
  kTurns,    // dQ^T as well, but all of it by one of them, another one in each step
};

// Tiles of dS in shared memory: one is written, of the one before dQ is made, and of the one before that another
// warpgroup may still be making it.
constexpr int kDsPlaces = 3;

// A block has one warpgroup that loads, and kWarpgroups that compute, each 64 keys. Tiles of kQ queries and of their dO
// come through a ring of kStages places.
template <int kHeadDim_, int kWarpgroups_, int kQ_, QueryShare kShare_, unsigned kReads = kNothing,
          bool kTakesTurns_ = false, int kHeldK_ = 0, int kHeldV_ = 0>
struct BackwardTile : TileReads<kReads> {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kQ = kQ_;
  static constexpr int kK = kWarpgroups * kWarpgroupRows;
  static constexpr int kStages = 2;
  static constexpr QueryShare kShare = kShare_;
  static constexpr bool kTakesTurns = kTakesTurns_;         // at issuing products
  static constexpr int kHeldK = kHeldK_, kHeldV = kHeldV_;  // steps of 16 columns that registers hold, of K and of V
  static_assert(!kTakesTurns || kWarpgroups == 2, "two warpgroups pass a turn to each other");
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroupThreads;

  // As in ForwardTile: the shares of the roles, in what the block has when it starts.
  static constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : 24;
  static constexpr int kComputeRegisters = kWarpgroups == 3 ? 160 : 240;
  static_assert(kLoadRegisters + kWarpgroups * kComputeRegisters <= 65536 / kThreads / 8 * 8 * (kWarpgroups + 1),
                "the warpgroups of a block do not have that many registers together");

  static constexpr int kWideHeadDim = (kHeadDim + 63) / 64 * 64;  // in shared memory, in whole chunks of 64 columns
  static_assert(kShare != QueryShare::kRows || kQ == kWarpgroups * kWarpgroupRows, "each warpgroup has 64 rows of dQ");
  static_assert(kShare != QueryShare::kColumns || kWideHeadDim == kWarpgroups * 64,
                "each warpgroup has 64 columns of dQ");
  static_assert(kShare != QueryShare::kTurns || kWideHeadDim == 64, "dQ^T in turns is one product, of 64 rows");
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kSharedBytes = 2 * 2 * kK * kWideHeadDim + kStages * 2 * 2 * kQ * kWideHeadDim +
                                      kDsPlaces * 2 * kQ * kK + kStages * 2 * 4 * kQ +
                                      (TileReads<kReads>::kStagesScores ? kStages * 2 * kQ * kK : 0) + kBarrierBytes;
};

// For each head dim: what each kind of call runs. Dense: all queries see all keys; Seeing: any visibility, plain
// scores. Registers hold as much of K and V as they can without a spill (of Reading it was not tried). Figures are
// TFLOP/s of the whole backward on an H200, 16384 tokens x 2048 columns in all, against the next best tile tried.
template <int kHeadDim>
struct BackwardTiles {
  static constexpr QueryShare kShare = QueryShare::kColumns;
  // 4k: 552 (no turns: 552, nor anything held: 530), causal 503 (503, 492), 16k: 590 (no turns: 581)
  using Dense = BackwardTile<kHeadDim, 2, 64, kShare, kNothing, true, 2>;
  using Long = Dense;
  using Short = Long;
  using Seeing = BackwardTile<kHeadDim, 2, 64, kShare, kVisibility, false, 2>;  // 568 (nothing held: 528)
  using General = BackwardTile<kHeadDim, 2, 64, kShare, kVisibility>;
  using Dropping = BackwardTile<kHeadDim, 2, 64, kShare, kVisibility | kDropout, false, 2>;
  using Staging = BackwardTile<kHeadDim, 2, 64, kShare, kVisibility | kStagedScores>;
  using StagingDropping = BackwardTile<kHeadDim, 2, 64, kShare, kVisibility | kStagedScores | kDropout>;
  using Reading = BackwardTile<kHeadDim, 2, 32, kShare, kVisibility | kScoreTensors>;  // 64 queries spill
};
template <>
struct BackwardTiles<96> {
  static constexpr QueryShare kShare = QueryShare::kColumns;
  using Dense = BackwardTile<96, 2, 64, kShare, kNothing, true, 6, 3>;  // 523 (no turns: 506)
  using Long = Dense;                                                   // causal 471 (465)
  using Short = Long;
  using Seeing = BackwardTile<96, 2, 64, kShare, kVisibility, false, 6, 3>;  // 514 (nothing held: 493)
  using General = BackwardTile<96, 2, 64, kShare, kVisibility, false, 6, 2>;
  using Dropping = BackwardTile<96, 2, 64, kShare, kVisibility | kDropout, false, 6, 3>;
  using Staging = BackwardTile<96, 2, 64, kShare, kVisibility | kStagedScores, false, 6, 2>;
  using StagingDropping = BackwardTile<96, 2, 64, kShare, kVisibility | kStagedScores | kDropout, false, 6, 2>;
  using Reading = BackwardTile<96, 2, 64, kShare, kVisibility | kScoreTensors>;
};
template <>
struct BackwardTiles<64> {
  static constexpr QueryShare kShare = QueryShare::kTurns;
  using Dense = BackwardTile<64, 3, 64, kShare>;              // 4k: 492 (2 warpgroups, K and V held: 473)
  using Long = Dense;                                         // causal 4k: 461 (436)
  using Short = BackwardTile<64, 2, 128, QueryShare::kRows>;  // 1k: 386 (371); causal 1k: 291 (295)
  using Seeing = BackwardTile<64, 2, 64, kShare, kVisibility, false, 4, 4>;  // 473 (nothing held: 444)
  using General = Seeing;
  using Dropping = BackwardTile<64, 2, 64, kShare, kVisibility | kDropout, false, 4, 4>;
  using Staging = BackwardTile<64, 2, 64, kShare, kVisibility | kStagedScores, false, 4, 4>;
  using StagingDropping = BackwardTile<64, 2, 64, kShare, kVisibility | kStagedScores | kDropout, false, 4, 4>;
  using Reading = BackwardTile<64, 2, 64, kShare, kVisibility | kScoreTensors>;
};

// Calls f(Type<BackwardTile<...>>, std::bool_constant) with the tile that a call runs, and whether scores are general.
template <int kHeadDim, class F>
auto with_backward_tile(const Problem& p, F&& f) {
  // Below, tiles of 64 and 128 leave less of a rest: d 128 at 512 tokens 380 against 361 of 80 queries.
  constexpr int kShort = kHeadDim == 64 ? 4096 : 1024;
  using Tiles = BackwardTiles<kHeadDim>;
  const bool drops = p.scores.dropout.seeds != nullptr;
  // The derivatives of a soft cap and the random bits of dropout do not fit the registers of larger tiles together.
  if (drops && p.scores.soft_cap != 0.0f) return f(Type<typename Tiles::Reading>{}, std::true_type{});
  if (staged_scores(p) != StagedScores::kNothing) {
    return drops ? f(Type<typename Tiles::StagingDropping>{}, std::true_type{})
                 : f(Type<typename Tiles::Staging>{}, std::true_type{});
  }
  if (reads_scores(p.scores)) return f(Type<typename Tiles::Reading>{}, std::true_type{});
  if (drops) return f(Type<typename Tiles::Dropping>{}, std::true_type{});
  if (is_general(p.scores)) return f(Type<typename Tiles::General>{}, std::true_type{});
  if (reads_visibility_backward(p)) return f(Type<typename Tiles::Seeing>{}, std::false_type{});
  if (p.shape.q_len / std::max(p.visibility.sequences, 1) < kShort)
    return f(Type<typename Tiles::Short>{}, std::false_type{});
  if (is_dense(p)) return f(Type<typename Tiles::Dense>{}, std::false_type{});
  return f(Type<typename Tiles::Long>{}, std::false_type{});
}

// Tiles of dQ are accumulated in f32, in the order of the threads' registers. A tile is cut into bands, each the 16
// rows of dQ (or, transposed, 16 columns) that a warp has, and a band into pieces of 16 x 8, where each lane has 4
// numbers side by side. The pieces that warps of a warpgroup add at the same time lie next to each other.
template <class Tile>
struct QueryGradientLayout {
  static constexpr bool kTransposed = Tile::kShare != QueryShare::kRows;
  static constexpr int kBands = (kTransposed ? Tile::kHeadDim : Tile::kQ) / 16;
  static constexpr int kTogether = kBands % 4 == 0 ? 4 : 2;  // bands whose pieces alternate
  static constexpr int kPieces = (kTransposed ? Tile::kQ : Tile::kHeadDim) / 8;
  static constexpr int kLaneFloats = 4;
  static constexpr int kPieceFloats = 32 * kLaneFloats;
  static constexpr int kTileFloats = kBands * kPieces * kPieceFloats;
  static_assert(kBands % kTogether == 0 && kTileFloats == Tile::kQ * Tile::kHeadDim);
};

inline int64_t query_tiles(const Problem& p, int q_tile) { return tiles_of(p, p.shape.q_len, q_tile, false); }

// Of Gradients::dq_accumulator.
template <int kHeadDim>
int64_t dq_accumulator_floats(const Problem& p) {
  if constexpr (kHeadDim > 128) {
    return 0;
  } else {
    return with_backward_tile<kHeadDim>(p, [&](auto tile, auto) {
      using Tile = typename decltype(tile)::type;
      const int64_t tiles = int64_t(p.shape.batch) * p.shape.heads * query_tiles(p, Tile::kQ);
      return tiles * QueryGradientLayout<Tile>::kTileFloats;
    });
  }
}

// Of Gradients::rows_to_come, in deterministic mode.
template <int kHeadDim>
int64_t rows_to_come_floats(const Problem& p) {
  if constexpr (kHeadDim > 128) {
    return 0;
  } else {
    return with_backward_tile<kHeadDim>(p, [&](auto tile, auto) {
      constexpr int kKeys = decltype(tile)::type::kK;
      const int64_t tiles = key_tiles(p, kKeys);
      return (2 * int64_t(p.shape.batch) * p.shape.heads * tiles + 3) / 4 * 4;
    });
  }
}

// Queries, dO and accumulated dQ of a section stay in the L2 together: all heads at once cost 20 to 25 % (d 128 at 1024
// tokens, d 64 at 4096), 20 MB 1 to 2 % (1024 tokens). Sections of fewer than 32 items cost 1 % (groups of 4 heads,
// 2048 tokens, causal).
//
// In deterministic mode a key tile is some 1.2 steps behind the one before it in adding to the same rows, and blocks
// wait where a head's tiles are begun closer to each other. So sections have heads enough for the tiles of one rank to
// take kLag steps together (4k causal, d 128: 362 with the sections above, 477 with kLag = 200, 473 with 400; 1k full
// 427, 436, 417).
inline WorkOrder backward_order(const Problem& p, int q_tile, int k_tile, bool deterministic) {
  constexpr int64_t kSectionBytes = 10 << 20, kLeastItems = 32, kLag = 200;
  const Shape& s = p.shape;
  const int64_t heads = int64_t(s.kv_heads) * s.batch, tiles = key_tiles(p, k_tile);
  const int64_t group_rows = int64_t(s.heads / std::max(s.kv_heads, 1)) * s.q_len;
  const int64_t bytes = group_rows * (6 * s.head_dim + 2 * s.value_dim);
  int64_t least_items = kLeastItems;
  if (deterministic) {
    const bool is_causal = p.visibility.window_right < s.k_len;
    const int64_t steps = std::max<int64_t>(group_rows / (is_causal ? 2 : 1) / q_tile, 1);  // of an item
    least_items = std::max(least_items, kLag * tiles / steps);
  }
  return work_order(p, heads, tiles, tiles_sequences_backward(p), bytes > 0 ? kSectionBytes / bytes : heads,
                    least_items);
}

}  // namespace jfa::sm90

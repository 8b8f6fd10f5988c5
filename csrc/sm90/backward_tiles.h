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

// A block has one warpgroup that loads, and kWarpgroups that compute, each 64 keys. Tiles of kQ queries and of their dO
// come through a ring of kStages places.
template <int kHeadDim_, int kWarpgroups_, int kQ_, QueryShare kShare_, unsigned kReads = kNothing>
struct BackwardTile : TileReads<kReads> {
  using Seeing = BackwardTile<kHeadDim_, kWarpgroups_, kQ_, kShare_, kReads | kVisibility>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kQ = kQ_;
  static constexpr int kK = kWarpgroups * kWarpgroupRows;
  static constexpr int kStages = 2;
  static constexpr QueryShare kShare = kShare_;
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
                                      2 * 2 * kQ * kK + kStages * 2 * 4 * kQ +
                                      (TileReads<kReads>::kStagesScores ? kStages * 2 * kQ * kK : 0) + kBarrierBytes;
};

// For each head dim: what each kind of call runs. Dense: all queries see all keys. Figures are TFLOP/s of the whole
// backward on an H200, 16384 tokens x 2048 columns in all, against the next best tile tried.
template <int kHeadDim>
struct BackwardTiles {
  using Dense = BackwardTile<kHeadDim, 2, 64, QueryShare::kColumns>;  // 80 queries spill: 4k 500 against 512
  using Long = Dense;
  using Short = Long;
  using General = typename Long::Seeing;
  using Dropping = BackwardTile<kHeadDim, 2, 64, QueryShare::kColumns, kVisibility | kDropout>;
  using Staging = BackwardTile<kHeadDim, 2, 64, QueryShare::kColumns, kVisibility | kStagedScores>;
  using StagingDropping = BackwardTile<kHeadDim, 2, 64, QueryShare::kColumns, kVisibility | kStagedScores | kDropout>;
  // 64 queries spill while they read a bias
  using Reading = BackwardTile<kHeadDim, 2, 32, QueryShare::kColumns, kVisibility | kScoreTensors>;
};
template <>
struct BackwardTiles<96> {
  using Dense = BackwardTile<96, 2, 64, QueryShare::kColumns>;  // 458 (80 queries: 461), causal 423 (416)
  using Long = Dense;
  using Short = Long;
  using General = Long::Seeing;
  using Dropping = BackwardTile<96, 2, 64, QueryShare::kColumns, kVisibility | kDropout>;
  using Staging = BackwardTile<96, 2, 64, QueryShare::kColumns, kVisibility | kStagedScores>;
  using StagingDropping = BackwardTile<96, 2, 64, QueryShare::kColumns, kVisibility | kStagedScores | kDropout>;
  using Reading = BackwardTile<96, 2, 64, QueryShare::kColumns, kVisibility | kScoreTensors>;
};
template <>
struct BackwardTiles<64> {
  using Dense = BackwardTile<64, 3, 64, QueryShare::kTurns>;  // 4k: 467 (2 warpgroups, 128 queries: 408)
  using Long = Dense;                                         // causal 4k: 449 (423)
  using Short = BackwardTile<64, 2, 128, QueryShare::kRows>;  // 1k: 386 (371); causal 1k: 291 (295)
  using General = BackwardTile<64, 2, 64, QueryShare::kTurns, kVisibility>;
  using Dropping = BackwardTile<64, 2, 64, QueryShare::kTurns, kVisibility | kDropout>;
  using Staging = BackwardTile<64, 2, 64, QueryShare::kTurns, kVisibility | kStagedScores>;
  using StagingDropping = BackwardTile<64, 2, 64, QueryShare::kTurns, kVisibility | kStagedScores | kDropout>;
  using Reading = BackwardTile<64, 2, 64, QueryShare::kTurns, kVisibility | kScoreTensors>;
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
  if (!is_formula(p.visibility)) return f(Type<typename Tiles::General>{}, std::false_type{});
  if (p.shape.q_len < kShort) return f(Type<typename Tiles::Short>{}, std::false_type{});
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

inline int64_t query_tiles(const Problem& p, int q_tile) { return (int64_t(p.shape.q_len) + q_tile - 1) / q_tile; }

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

// Queries, dO and accumulated dQ of a section stay in the L2 together: all heads at once cost 20 to 25 % (d 128 at 1024
// tokens, d 64 at 4096), 20 MB 1 to 2 % (1024 tokens). Sections of fewer than 32 items cost 1 % (groups of 4 heads,
// 2048 tokens, causal).
inline WorkOrder backward_order(const Problem& p, int k_tile) {
  constexpr int64_t kSectionBytes = 10 << 20, kLeastItems = 32;
  const Shape& s = p.shape;
  const int64_t heads = int64_t(s.kv_heads) * s.batch, tiles = (s.k_len + k_tile - 1) / k_tile;
  const int64_t bytes = int64_t(s.heads / std::max(s.kv_heads, 1)) * s.q_len * (6 * s.head_dim + 2 * s.value_dim);
  return work_order(p, heads, tiles, bytes > 0 ? kSectionBytes / bytes : heads, kLeastItems);
}

}  // namespace jfa::sm90

// The shapes the Hopper family's kernels are compiled in, and the one function that chooses among them.
#pragma once

#include <cstdint>
#include <string>

#include "problem.h"
#include "sm90/sequence_tiles.h"
#include "sm90/work_order.h"

namespace jfa::sm90 {

constexpr int kSharedMemoryLimit = 227 * 1024;
constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64;  // M of wgmma

// What the threads of a tile may read besides queries, keys and values; each costs registers.
enum Reads : unsigned {
  kNothing = 0,
  kVisibility = 1,    // who sees whom, where that is more than a formula, and sinks: 4 % at d 128
  kScoreTensors = 2,  // a bias or a mask, from device memory
  kStagedScores = 4,  // a bias or a mask that TMA copies to shared memory
  kDropout = 8,       // the seeds of dropout, which there always is; with kScoreTensors there may be
  kAnyDropout = 16,   // those of dropout, which there may be
};
template <unsigned kReads>
struct TileReads {
  static constexpr bool kAnyVisibility = kReads & kVisibility;
  static constexpr bool kReadsScores = kReads & kScoreTensors;
  static constexpr bool kStagesScores = kReads & kStagedScores;
  static constexpr bool kDrops = kReads & kDropout;
  static constexpr bool kMayDrop = kDrops || kReadsScores || (kReads & kAnyDropout);
  static constexpr bool kCaps = !kDrops;  // in a backward: the derivatives of a soft cap are kept
};

// A block has one warpgroup that loads, and kWarpgroups that compute, each 64 query rows. Tiles of kK keys and of their
// values share a ring of kSlots places. Q in registers frees its place in shared memory for the next query tile.
//
// The two blocks of a cluster work on the same rows of two query heads of a group, or on neighbouring query tiles of
// one head (`pairs_heads()`). Each loads half of every tile of keys and values into both, which halves what the
// multiprocessors read from the L2.
template <int kHeadDim_, int kValueDim_, int kWarpgroups_, int kK_, int kSlots_, bool kQueryInRegisters_,
          int kCluster_ = 1, unsigned kReads = kNothing>
struct ForwardTile : TileReads<kReads> {
  // The same with kVisibility, for which more than 128 keys leave no registers.
  using Seeing = ForwardTile<kHeadDim_, kValueDim_, kWarpgroups_, kK_ <= 128 ? kK_ : 128, kSlots_, kQueryInRegisters_,
                             kCluster_, kReads | kVisibility>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kValueDim = kValueDim_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kQ = kWarpgroups * kWarpgroupRows;
  static constexpr int kK = kK_;
  static constexpr int kSlots = kSlots_;
  static constexpr bool kQueryInRegisters = kQueryInRegisters_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kClusterQ = kCluster * kQ;  // rows of one item, over all its heads
  static constexpr bool kStagesScores = TileReads<kReads>::kStagesScores;
  static_assert(!kStagesScores || kCluster == 1, "the blocks of a cluster do not load biases and masks for each other");
  static_assert(kCluster == 1 || (kCluster == 2 && (kHeadDim + 63) / 64 % 2 == 0 && (kValueDim + 63) / 64 % 2 == 0),
                "a cluster's blocks load whole chunks of 64 columns");
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroupThreads;

  // Registers of a thread: as the block starts, an equal share of 65536 in steps of 8, then what the roles need.
  // Growing beyond the sum of those shares would wait for ever.
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : kCluster == 2 ? 40 : 24;
  static constexpr int kComputeRegisters = kWarpgroups == 3 ? 160 : kCluster == 2 ? 232 : 240;
  // Whether what rows see is kept from tile to tile: not where scores are read, nor, of tiles with kVisibility, beside
  // dropout that leaves few registers, or beside 112 keys, since all these spilled.
  static constexpr bool kDropsTightly = TileReads<kReads>::kDrops && (kQueryInRegisters || kHeadDim == 256);
  static constexpr bool kKeepsRows = !TileReads<kReads>::kReadsScores && !kStagesScores &&
                                     !(TileReads<kReads>::kAnyVisibility && (kDropsTightly || kK == 112));
  static_assert(kLoadRegisters + kWarpgroups * kComputeRegisters <= (kWarpgroups + 1) * kStartRegisters,
                "the warpgroups of a block do not have that many registers together");

  static constexpr int kWideHeadDim = (kHeadDim + 63) / 64 * 64;  // in shared memory, in whole chunks of 64 columns
  static constexpr int kWideValueDim = (kValueDim + 63) / 64 * 64;
  static constexpr int kQueryBytes = 2 * kQ * kWideHeadDim;
  static constexpr int kSlotBytes = 2 * kK * (kWideHeadDim > kWideValueDim ? kWideHeadDim : kWideValueDim);
  static constexpr int kOutputBytes = 2 * kQ * kWideValueDim;
  static constexpr int kStagedBytes = kStagesScores ? 2 * kQ * ((kK + 63) / 64 * 64) : 0;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kBytesBeforeOutput = kQueryBytes + kSlots * kSlotBytes + kStagedBytes + kBarrierBytes;
  // Outputs leave by TMA, through a place of their own, where there is room for it. Where there is still more, queries
  // that go to registers have two: with one, items of few tiles of keys end before the next queries have come (d 128,
  // 32/8 heads, causal, 128 tokens: 162 TFLOP/s against 130, 256: 264 against 249).
  static constexpr bool kStoreByTma = kBytesBeforeOutput + kOutputBytes <= kSharedMemoryLimit;
  static constexpr int kBytesBeforeQueries = kBytesBeforeOutput + (kStoreByTma ? kOutputBytes : 0);
  static constexpr int kQueryPlaces =
      kQueryInRegisters && kBytesBeforeQueries + kQueryBytes <= kSharedMemoryLimit ? 2 : 1;
  static constexpr int kSharedBytes = kBytesBeforeQueries + (kQueryPlaces - 1) * kQueryBytes;
};

template <int kHeadDim, int kValueDim, int kWarpgroups, int kK, int kSlots, bool kQueryInRegisters, int kCluster = 1>
using DroppingTile = ForwardTile<kHeadDim, kValueDim, kWarpgroups, kK, kSlots, kQueryInRegisters, kCluster, kDropout>;
template <int kHeadDim, int kValueDim, int kWarpgroups, int kK, int kSlots, bool kQueryInRegisters,
          unsigned kDrops = kNothing>
using StagingTile = ForwardTile<kHeadDim, kValueDim, kWarpgroups, kK, kSlots, kQueryInRegisters, 1,
                                kVisibility | kStagedScores | kDrops>;
template <int kHeadDim, int kValueDim, int kWarpgroups, int kK, int kSlots, bool kQueryInRegisters>
using ReadingTile =
    ForwardTile<kHeadDim, kValueDim, kWarpgroups, kK, kSlots, kQueryInRegisters, 1, kVisibility | kScoreTensors>;

// For each pair of head dim and value dim: what each kind of call runs. Figures are TFLOP/s on an H200, 16384 tokens x
// 2048 columns in all, 4k and full unless said, against the next best tile tried; those of general scores with a soft
// cap, those of Dropping with dropout.
template <int kHeadDim, int kValueDim>
struct ForwardTiles {
  using Dense = ForwardTile<kHeadDim, kValueDim, 2, 64, 4, false>;
  using ShortDense = Dense;
  using Long = Dense;
  using Short = Dense;
  using GeneralDense = Dense;
  using General = Dense;
  using Dropping = DroppingTile<kHeadDim, kValueDim, 2, 64, 4, false>;
  using Staging = StagingTile<kHeadDim, kValueDim, 2, 64, 4, false>;
  using StagingDropping = StagingTile<kHeadDim, kValueDim, 2, 64, 4, false, kDropout>;
  using Reading = ReadingTile<kHeadDim, kValueDim, 2, 64, 4, false>;
};

template <>
struct ForwardTiles<64, 64> {
  using Dense = ForwardTile<64, 64, 3, 128, 6, false>;  // 1k: 426 (2x128: 412), 16k: 557 (3x96: 540)
  using ShortDense = Dense;
  using Long = ForwardTile<64, 64, 3, 96, 6, true>;         // causal 4k: 438 (2x128: 431), 16k: 513 (472)
  using Short = ForwardTile<64, 64, 2, 128, 6, true>;       // causal 1k: 330 (3x96: 289)
  using GeneralDense = Long;                                // 337 (2x128: 329)
  using General = Short;                                    // causal: 308 (3x96: 313), documents of 1024: 243 (212)
  using Dropping = DroppingTile<64, 64, 2, 128, 6, false>;  // 356 (with queries in registers 349, 2x192: 360)
  using Staging = StagingTile<64, 64, 2, 128, 6, true>;
  using StagingDropping = StagingTile<64, 64, 2, 128, 6, true, kDropout>;
  using Reading = ReadingTile<64, 64, 2, 96, 6, false>;  // wider tiles spill while they read a bias, here and below
};
template <>
struct ForwardTiles<96, 96> {
  using Dense = ForwardTile<96, 96, 3, 96, 6, false, 2>;  // 593 (2x128: 573), 16k: 627 (595)
  using Long = ForwardTile<96, 96, 2, 128, 4, true, 2>;   // causal: 507 (without cluster 484, 3x96: 480)
  using ShortDense = Long;                                // 1k: 506 (3x96: 451)
  using Short = ForwardTile<96, 96, 2, 128, 4, true>;
  using GeneralDense = Short;                                 // 433 (cluster 437)
  using General = Short;                                      // causal: 377 (376)
  using Dropping = DroppingTile<96, 96, 2, 128, 4, true, 2>;  // causal: 341 (without cluster 327)
  using Staging = StagingTile<96, 96, 2, 128, 4, false>;      // with queries in registers it spills
  using StagingDropping = StagingTile<96, 96, 2, 128, 4, false, kDropout>;
  using Reading = ReadingTile<96, 96, 2, 96, 5, false>;
};
template <>
struct ForwardTiles<128, 128> {
  using Dense = ForwardTile<128, 128, 2, 128, 4, true, 2>;  // 1k: 594 (without cluster 571), 16k: 717 (685)
  using ShortDense = Dense;
  using Long = Dense;                                    // causal 4k: 608 (589), 16k: 693 (651)
  using Short = ForwardTile<128, 128, 2, 128, 4, true>;  // causal 1k: 432 (with cluster 418), 2k: 555 (545)
  using GeneralDense = Dense;                            // 508 (without cluster 497)
  using General = Short;                                 // causal: 446 (with cluster 432)
  // 487 (without cluster 481, 2x128: 469, with queries in registers 453), causal 423 (425, 421, 410)
  using Dropping = DroppingTile<128, 128, 2, 160, 4, false, 2>;
  using Staging = StagingTile<128, 128, 2, 128, 4, false>;
  using StagingDropping = StagingTile<128, 128, 2, 64, 6, false, kDropout>;  // 330 (Reading: 182); 128 keys spill
  using Reading = ReadingTile<128, 128, 2, 80, 6, false>;
};
template <>
struct ForwardTiles<192, 128> {
  using Dense = ForwardTile<192, 128, 2, 128, 3, false>;  // causal 8k: 620; no other tile was tried
  using ShortDense = Dense;
  using Long = Dense;
  using Short = Dense;
  using GeneralDense = Dense;
  using General = Dense;
  using Dropping = DroppingTile<192, 128, 2, 128, 3, false>;
  using Staging = StagingTile<192, 128, 2, 64, 6, false>;
  using StagingDropping = StagingTile<192, 128, 2, 64, 6, false, kDropout>;
  using Reading = ReadingTile<192, 128, 2, 64, 6, false>;
};
template <>
struct ForwardTiles<192, 192> {
  using Dense = ForwardTile<192, 192, 2, 112, 3, false>;  // 703 (2x64: 697)
  using ShortDense = Dense;
  using Long = ForwardTile<192, 192, 2, 64, 6, false>;  // causal: 564 (2x96: 536)
  using Short = Long;
  using GeneralDense = Dense;                                // 578 (2x64: 542)
  using General = Dense;                                     // causal: 503 (2x64: 491)
  using Dropping = DroppingTile<192, 192, 2, 96, 3, false>;  // 487 (2x64: 469)
  using Staging = StagingTile<192, 192, 2, 64, 5, false>;
  using StagingDropping = StagingTile<192, 192, 2, 64, 5, false, kDropout>;
  using Reading = ReadingTile<192, 192, 2, 64, 6, false>;
};
template <>
struct ForwardTiles<256, 256> {
  using Dense = ForwardTile<256, 256, 2, 96, 3, false>;       // 711 (2x64: 705), 16k: 760 (742)
  using ShortDense = ForwardTile<256, 256, 2, 64, 5, false>;  // 1k: 581 (2x96: 562)
  using Long = ForwardTile<256, 256, 2, 64, 5, false, 2>;     // causal 4k: 612 (without cluster 594), 16k: 719 (684)
  using Short = ShortDense;                                   // causal 1k: 432 (with cluster 425)
  using GeneralDense = Short;                                 // 593 (with cluster 596)
  using General = Short;                                      // causal: 523 (with cluster 506)
  using Dropping = DroppingTile<256, 256, 2, 64, 5, false>;   // causal: 470 (with cluster 446)
  using Staging = StagingTile<256, 256, 2, 32, 6, false>;
  using StagingDropping = StagingTile<256, 256, 2, 32, 6, false, kDropout>;
  using Reading = ReadingTile<256, 256, 2, 32, 6, false>;
};

// Scores of the first four are plain. Of the others they are general: worked out; worked out, and some dropped; with a
// bias or a mask that comes by TMA; that, and some dropped; or with what the threads that use it read from memory,
// where some may be dropped too.
enum class ForwardKind {
  kDense,
  kShortDense,
  kLong,
  kShort,
  kGeneralDense,
  kGeneral,
  kDropping,
  kStaging,
  kStagingDropping,
  kReading
};

// What TMA brings of it, in tiles: a mask, or a bias of the operands' type, but not both; with rows that begin at
// multiples of 16 bytes, and end where the keys do.
enum class StagedScores { kNothing, kBias, kMask };
inline StagedScores staged_scores(const Problem& p) {
  const ScoreTensor &bias = p.scores.bias, &mask = p.scores.mask;
  const auto fits = [](const ScoreTensor& tensor, int keys_of_16_bytes) {
    return tensor.k_len > 0 && tensor.k_len % keys_of_16_bytes == 0 &&
           reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  };
  if (bias.data != nullptr && mask.data != nullptr) return StagedScores::kNothing;
  if (bias.data != nullptr && bias.type == p.type && fits(bias, 8)) return StagedScores::kBias;
  if (mask.data != nullptr && fits(mask, 16)) return StagedScores::kMask;
  return StagedScores::kNothing;
}
// One row for all queries is loaded as one, to the first of a tile. The number of a row is masked with this.
inline int staged_row_mask(const Problem& p) {
  const ScoreTensor& tensor = p.scores.mask.data != nullptr ? p.scores.mask : p.scores.bias;
  return tensor.q_len > 1 ? -1 : 0;
}

// All query tiles see all keys.
inline bool is_dense(const Problem& p) {
  const Visibility& v = p.visibility;
  return v.window_left >= p.shape.k_len && v.window_right >= p.shape.k_len && v.q_lengths == nullptr &&
         v.k_lengths == nullptr && is_formula(v);
}

// What tiles with kVisibility are for.
inline bool reads_visibility(const Problem& p) {
  return (!is_formula(p.visibility) && !tiles_sequences(p)) || p.scores.sinks.data != nullptr;
}
inline bool reads_visibility_backward(const Problem& p) {
  return !is_formula(p.visibility) && !tiles_sequences_backward(p);
}

inline ForwardKind general_kind(const Problem& p) {
  const bool drops = p.scores.dropout.seeds != nullptr;
  if (staged_scores(p) != StagedScores::kNothing) return drops ? ForwardKind::kStagingDropping : ForwardKind::kStaging;
  if (reads_scores(p.scores)) return ForwardKind::kReading;
  if (drops) return ForwardKind::kDropping;
  return is_dense(p) && !reads_visibility(p) ? ForwardKind::kGeneralDense : ForwardKind::kGeneral;
}

// Whether a cluster's item is one query tile of two heads of a group: unlike two tiles of one head they are as long.
template <class Tile>
bool pairs_heads(const Problem& p) {
  return Tile::kCluster == 2 && p.shape.heads / std::max(p.shape.kv_heads, 1) % 2 == 0;
}

// Where query tiles see different parts of the keys, a cluster of two of them waits for the longer one: that pays where
// rows see enough keys. One of two heads (`pairs`: kLong has those) pays where there are many items, which end evenly.
// None pays where most multiprocessors have nothing to do.
inline ForwardKind forward_kind(const Problem& p, int multiprocessors, bool pairs) {
  constexpr int64_t kShortKeys = 2048, kShortDenseKeys = 1024, kPairedWaves = 12;
  if (is_general(p.scores)) return general_kind(p);
  // A quarter of a wave: calls of 5.9 us instead of 6.9 (16 tiles of 128 rows and keys, d 128).
  const int64_t wave = int64_t(128) * multiprocessors, rows = int64_t(p.shape.q_len) * p.shape.heads * p.shape.batch;
  if (rows <= wave / 4) return ForwardKind::kShort;
  if (is_dense(p) && !reads_visibility(p)) {
    return p.shape.k_len <= kShortDenseKeys ? ForwardKind::kShortDense : ForwardKind::kDense;
  }
  // Causal, 16/4 heads of d 128: 2048 tokens, 8 batch entries (16 waves) 576 (566), 2 (4) 539 (544), 1 (2) 423 (442);
  // 512 tokens, 32 (16) 365 (363), 8 (4) 324 (335).
  if (pairs && rows >= kPairedWaves * wave) return ForwardKind::kLong;
  const Visibility& v = p.visibility;
  // How long segments are, only the device knows: full ones of 1024 tokens gain 4 % in clusters, shorter ones were not
  // timed.
  if (v.q_segments != nullptr) return ForwardKind::kShort;
  const int64_t window = int64_t(v.window_left) + v.window_right + 1;
  const int64_t keys = v.sequences > 1 ? p.shape.k_len / v.sequences : p.shape.k_len;  // of an average sequence
  // All rows of a sequence see the same of it, as in dense attention: d 64, 16 of 1024: 420 (kLong: 399), d 96 495
  // (488).
  if (v.sequences > 1 && v.window_left >= p.shape.k_len && v.window_right >= p.shape.k_len && keys >= kShortDenseKeys)
    return tiles_sequences(p) ? ForwardKind::kShortDense : ForwardKind::kLong;
  return std::min<int64_t>(keys, window) <= kShortKeys ? ForwardKind::kShort : ForwardKind::kLong;
}

// `q_tile`: rows of an item, which has `item_heads`. `by_sequence`: tiles are listed.
inline WorkOrder forward_order(const Problem& p, int q_tile, int item_heads = 1, bool by_sequence = false) {
  const int64_t heads = int64_t(p.shape.heads / item_heads) * p.shape.batch;
  const int64_t tiles = tiles_of(p, p.shape.q_len, q_tile, by_sequence);
  if (is_dense(p)) {
    WorkOrder order = work_order(p, heads, tiles, by_sequence, 1);
    order.item_heads = item_heads;
    order.sections = order.heads;  // all tiles are as long
    // Equal items; dealing them out wins where there are few and long ones (d 256, 16384 keys: 760 against 743), and
    // loses where tiles of 192 rows leave a rest (d 64, 4096 keys: 415 against 518).
    order.drawn = p.shape.k_len <= 4096 || q_tile % 128 != 0;
    // All batch entries may share what is largest, a bias or a mask of [1, heads, q_len, k_len].
    const ScoreTensor& largest = p.scores.bias.data != nullptr ? p.scores.bias : p.scores.mask;
    order.batch_fastest = largest.data != nullptr && largest.batch == 1 && largest.heads > 1;
    return order;
  }
  // Keys and values of a section: with 32 MB instead, 1 to 5 % less at d 64 and 128, and at d 256 up to 2048 tokens;
  // all heads at once cost 3 to 10 %. Fewer than four sequences leave too few items of each length to balance (5 % at d
  // 256, 16384 keys), fewer than 96 items too few for the multiprocessors (4 % at d 256, 4096 keys).
  constexpr int64_t kSectionBytes = 12 << 20;
  constexpr int64_t kLeastSequences = 4, kLeastItems = 96;
  const int64_t kv_bytes = int64_t(p.shape.k_len) * (p.shape.head_dim + p.shape.value_dim) * 2;
  const int64_t group = p.shape.heads / std::max(p.shape.kv_heads, 1) / item_heads;
  const int64_t fit = kv_bytes > 0 ? kSectionBytes / kv_bytes * group : heads;
  const int64_t sequences = std::max(p.visibility.sequences, 1);
  const int64_t least = (kLeastSequences + sequences - 1) / sequences;
  WorkOrder order = work_order(p, heads, tiles, by_sequence, std::max(fit, least), kLeastItems);
  order.item_heads = item_heads;
  order.drawn = true;
  return order;
}
template <class Tile>
WorkOrder forward_order(const Problem& p) {
  const bool pairs = pairs_heads<Tile>(p);
  return forward_order(p, pairs ? Tile::kQ : Tile::kClusterQ, pairs ? 2 : 1, tiles_sequences(p));
}

}  // namespace jfa::sm90

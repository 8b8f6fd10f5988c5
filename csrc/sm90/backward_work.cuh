// What the roles of the Hopper backward share: the arguments, the picture of shared memory, and the items of work.
#pragma once

#include "common/schedule.cuh"
#include "common/sequence.cuh"
#include "sm90/backward_tiles.h"
#include "sm90/pipeline.cuh"
#include "sm90/sequence_tiles.cuh"
#include "sm90/shared_matrix.cuh"
#include "sm90/work_place.cuh"

namespace jfa::sm90 {

struct BackwardArguments {
  TensorMap q, k, v, d_o;
  TensorMap scores;  // what is staged
  StagedScores staged;
  int staged_row_mask;
  Problem p;
  Gradients g;
  WorkOrder order;
  SequenceTiles tiles;
};

// One item as the roles see it: a key tile, and the query tiles that see some of its keys, the same for each query head
// of the group. Computed once, by the warp that loads.
struct BackwardItem {
  int first_key;  // negative: there is no more work
  int kv_head, batch;
  int rank;  // among the key tiles of this head, by which they add to dQ in deterministic mode
  int q_begin, q_len, k_begin, k_len, offset;  // as in Sequence
  int stop;                                    // of keys that are written
  int from_row, q_tiles;                       // the first query tile to come, and how many there are; possibly none
};
// An item is read for the last time while the next two are published.
constexpr int kBackwardItems = 4;

template <class Shape>
struct BackwardSmem {
  static constexpr int kDqTurns = Shape::kShare == QueryShare::kTurns ? Shape::kWarpgroups : 1;
  struct Stage {
    float lse_log2[Shape::kQ];  // +inf for a row that sees nothing
    float delta[Shape::kQ];
  };
  using StagedBias = Tile<Shape::kQ, Shape::kK>;
  // There is no swizzle as wide as the keys of three warpgroups, which nothing is staged for.
  using StagedMask = ByteTile<Shape::kQ, Shape::kWarpgroups == 2 ? Shape::kK : kRowBytes>;
  struct Scores {
    StagedBias scores[Shape::kStages];  // a mask takes half of it
  };
  struct NoScores {};
  Tile<Shape::kK, Shape::kHeadDim> k, v;
  Tile<Shape::kQ, Shape::kHeadDim> q[Shape::kStages], d_o[Shape::kStages];
  Tile<Shape::kQ, Shape::kK> ds[kDsPlaces];
  std::conditional_t<Shape::kStagesScores, Scores, NoScores> staged;
  alignas(16) Stage rows[Shape::kStages];  // full with q
  alignas(8) uint64_t q_full[Shape::kStages], d_o_full[Shape::kStages];
  uint64_t staged_full[Shape::kStages];
  uint64_t stage_free[Shape::kStages];  // of Q, dO, the statistics, and what is staged
  uint64_t kv_full, kv_free;
  uint64_t ds_full;
  // In deterministic mode: a tile's sums may be added to dQ, by one warpgroup of kTurns or by all; and have been.
  uint64_t dq_turn[kDqTurns], dq_added;
  uint64_t landed;  // a tile that has to be cleaned before it is full
  uint64_t item_ready[kBackwardItems];
  BackwardItem items[kBackwardItems];
};

// The item with that count, when it has been published.
template <class Shape>
__device__ __forceinline__ BackwardItem wait_for_item(const BackwardSmem<Shape>& smem, unsigned count) {
  const unsigned slot = count % kBackwardItems;
  mbarrier_wait(shared_address(&smem.item_ready[slot]), count / kBackwardItems % 2);
  return load_item<BackwardItem>(shared_address(&smem.items[slot]));
}

// Of a warp that has read an item, and all that it needs of it; before the last of them has, it is not overwritten.
template <class Shape>
__device__ __forceinline__ void leave_item(BackwardSmem<Shape>& smem, unsigned count) {
  // Without the wait this warp could arrive for the next item in the same phase.
  mbarrier_wait(shared_address(&smem.kv_full), count % 2);
  arrive_for_warp(shared_address(&smem.kv_free));
}

// From one query tile of an item to the next. Causal key tiles begin with the rows on the diagonal, each with others.
// Where their additions have an order, with the last ones: what comes first by number, and is longer, is there already.
template <class Shape>
__device__ __forceinline__ int row_step(const Gradients& g) {
  return g.deterministic ? -Shape::kQ : Shape::kQ;
}

// The item with that number: sections of heads, in each of them the first key tiles of all heads first. `rows` are the
// queries that see some key of the tile.
template <class Shape>
__device__ __forceinline__ BackwardItem backward_item(const BackwardArguments& a, const WorkOrder& order, int number,
                                                      Interval& rows) {
  const WorkPlace place = place_of(order, number, a.p.shape.batch);
  BackwardItem item;
  item.kv_head = place.head;
  item.batch = place.batch;
  item.rank = place.rank;
  const SequenceTile tile = tile_of_item<Shape>(a, place, place.tile * Shape::kK, a.p.shape.k_len);
  item.first_key = tile.first;
  set_bounds(item, tile);
  const Sequence sequence = sequence_of<Shape>(a.p, item);
  rows = sequence.rows_of_keys(item.first_key, item.first_key + Shape::kK);
  if (rows.empty()) rows = {0, 0};  // not one that ends before it begins: loops over its tiles must agree
  const int first_row = rows.begin / Shape::kQ * Shape::kQ;  // on the grid of tiles that all key tiles share
  item.q_tiles = ceil_div(rows.end - first_row, Shape::kQ);
  item.from_row = a.g.deterministic ? first_row + (item.q_tiles - 1) * Shape::kQ : first_row;
  return item;
}

// In deterministic mode: the query rows [begin, end) that a key tile has not added to yet. All zeros stand for all rows
// there are, of a key tile that no block has begun with.
struct RowsToCome {
  uint32_t begin, end;

  __device__ __forceinline__ static RowsToCome of(uint64_t word) { return {uint32_t(word), ~uint32_t(word >> 32)}; }
  __device__ __forceinline__ uint64_t word() const { return uint64_t(~end) << 32 | begin; }
};

// In a tile of dQ's accumulator, where a piece of a band begins; and of the `number`-th piece in memory, which it is.
template <class Layout>
__device__ __forceinline__ constexpr int piece_offset(int band, int piece) {
  constexpr int kTogether = Layout::kTogether;
  return ((band / kTogether * Layout::kPieces + piece) * kTogether + band % kTogether) * Layout::kPieceFloats;
}
template <class Layout>
__device__ __forceinline__ constexpr int band_of_piece(int number) {
  return number / (Layout::kTogether * Layout::kPieces) * Layout::kTogether + number % Layout::kTogether;
}
template <class Layout>
__device__ __forceinline__ constexpr int piece_of_band(int number) {
  return number / Layout::kTogether % Layout::kPieces;
}

// Where the pieces of one tile of dQ begin.
template <class Shape>
__device__ __forceinline__ float* dq_tile(const Problem& p, const Gradients& g, int b, int h, int row) {
  const int64_t tile = (int64_t(b) * p.shape.heads + h) * ceil_div(p.shape.q_len, Shape::kQ) + row / Shape::kQ;
  return g.dq_accumulator + tile * QueryGradientLayout<Shape>::kTileFloats;
}

}  // namespace jfa::sm90

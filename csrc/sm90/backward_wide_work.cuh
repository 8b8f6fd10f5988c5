// What the roles of the backward for wide heads share: the arguments, the picture of shared memory, the items of work.
#pragma once

#include "common/dropout.cuh"
#include "common/sequence.cuh"
#include "sm90/backward_wide_tiles.h"
#include "sm90/pipeline.cuh"
#include "sm90/sequence_tiles.cuh"
#include "sm90/shared_matrix.cuh"
#include "sm90/staged_scores.cuh"
#include "sm90/work_place.cuh"

namespace jfa::sm90 {

struct BackwardWideArguments {
  TensorMap q, k, v, d_o;
  Problem p;
  Gradients g;
  WorkOrder order;
  SequenceTiles tiles;
  uint32_t* counter;  // of items drawn; 0 before
  TensorMap scores;   // what is staged
  StagedScores staged;
  int staged_row_mask;
};

// Computed once, by the warp that loads the queries. The rows are those that see some key of the cluster's tiles; an
// item that none sees has one tile of rows outside the tensor, where zeros are loaded.
struct BackwardWideItem {
  int first_key;                               // negative: there is no more work
  int head, batch;                             // head of keys and values
  int q_begin, q_len, k_begin, k_len, offset;  // as in Sequence
  int stop;                                    // of keys that are written
  int first_row, end_row;
  int tiles;  // of rows, for each query head of the group
};
constexpr int kBackwardWideItems = 2;  // published at a time: the one in work and the next
constexpr int kBackwardWideItemWords = 12;
static_assert(sizeof(BackwardWideItem) <= 4 * kBackwardWideItemWords);

template <class Shape>
struct BackwardWideScores {
  Tile<Shape::kQ, Shape::kKeys> scores[Shape::kQueryStages];  // a mask takes half of a place
};

template <class Shape>
struct BackwardWideSmem : std::conditional_t<Shape::kStagesScores, BackwardWideScores<Shape>, NoScores> {
  using StagedBias = Tile<Shape::kQ, Shape::kKeys>;
  using StagedMask = ByteTile<Shape::kQ, Shape::kKeys>;
  Tile<Shape::kKeys, Shape::kHeadDim> k;
  Tile<Shape::kKeys, Shape::kValueDim> v;
  Tile<Shape::kQ, Shape::kHeadDim> q[Shape::kQueryStages];
  Tile<Shape::kQ, Shape::kValueDim> d_o[Shape::kStages];
  alignas(16) float p[Shape::kPlaces][Shape::kKeys * Shape::kQ];
  alignas(16) float lse_log2[Shape::kQueryStages][Shape::kQ];
  float delta[Shape::kStages][Shape::kQ];
  alignas(16) uint32_t items[kBackwardWideItems][kBackwardWideItemWords];
  uint64_t item_full[kBackwardWideItems], item_free[kBackwardWideItems];
  uint64_t k_full, k_free, v_full, v_free;
  uint64_t q_full[Shape::kQueryStages], q_free[Shape::kQueryStages];  // with the queries, what is staged
  uint64_t d_o_full[Shape::kStages], d_o_free[Shape::kStages];
  uint64_t p_full[Shape::kPlaces], p_free[Shape::kPlaces];
  // Of tiles of which rows have to be cleaned before they are full. One for each stage: the other block of a cluster
  // may be at its next such tile already, and bytes that it loads must not end the wait for this one's.
  uint64_t q_landed[Shape::kQueryStages], d_o_landed[Shape::kStages];
  uint64_t drawn_ready[kBackwardWideItems];  // in the second block of a cluster: what the first has drawn for both
  uint32_t drawn[kBackwardWideItems];
};

// The two streams through a block, as addresses: queries, with K and lse, and dO, with V and delta. A computing
// warpgroup multiplies what stays of one with what streams, and accumulates with what streams of the other.
template <class Shape, bool kOfQueries>
struct BackwardWideStream {
  static constexpr int kDim = kOfQueries ? Shape::kHeadDim : Shape::kValueDim;
  static constexpr int kStages = kOfQueries ? Shape::kQueryStages : Shape::kStages;
  using Resident = Tile<Shape::kKeys, kDim>;
  using Streamed = Tile<Shape::kQ, kDim>;
  uint32_t resident, streamed, statistics;
  uint32_t resident_full, resident_free, full, free, landed;

  __device__ __forceinline__ explicit BackwardWideStream(const BackwardWideSmem<Shape>& smem)
      : resident(kOfQueries ? shared_address(smem.k.bytes) : shared_address(smem.v.bytes)),
        streamed(kOfQueries ? shared_address(smem.q) : shared_address(smem.d_o)),
        statistics(kOfQueries ? shared_address(smem.lse_log2) : shared_address(smem.delta)),
        resident_full(shared_address(kOfQueries ? &smem.k_full : &smem.v_full)),
        resident_free(shared_address(kOfQueries ? &smem.k_free : &smem.v_free)),
        full(shared_address(kOfQueries ? smem.q_full : smem.d_o_full)),
        free(shared_address(kOfQueries ? smem.q_free : smem.d_o_free)),
        landed(shared_address(kOfQueries ? smem.q_landed : smem.d_o_landed)) {}
};

// Where the first tile of rows begins.
__device__ __forceinline__ int first_tile_row(const BackwardWideArguments& a, const BackwardWideItem& item) {
  return item.first_row < a.p.shape.q_len ? first_of_block(a.p.scores, item.first_row) : item.first_row;
}

// The item with that number, as block `rank` of a cluster works on it; none past the last.
template <class Shape>
__device__ __forceinline__ BackwardWideItem backward_wide_item(const BackwardWideArguments& a, const WorkOrder& order,
                                                               int number, int rank) {
  BackwardWideItem item{-1};
  if (number >= order.items) return item;
  const WorkPlace place = place_of(order, number, a.p.shape.batch);
  item.head = place.head;
  item.batch = place.batch;
  const SequenceTile tile = tile_of_item<Shape>(a, place, place.tile * Shape::kClusterKeys, a.p.shape.k_len);
  set_bounds(item, tile);
  item.first_key = tile.first + rank * Shape::kKeys;
  const Sequence sequence = sequence_of<Shape>(a.p, item);
  Interval rows = sequence.rows_of_keys(tile.first, tile.first + Shape::kClusterKeys);
  const int outside = max(a.p.shape.q_len, 1);
  if (rows.empty()) rows = {outside, outside};
  item.first_row = rows.begin;
  item.end_row = rows.end;
  item.tiles = max(1, ceil_div(rows.end - first_tile_row(a, item), Shape::kQ));
  return item;
}

}  // namespace jfa::sm90

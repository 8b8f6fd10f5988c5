// What the roles of the Hopper forward share: the arguments, the picture of shared memory, and the items of work.
#pragma once

#include <type_traits>

#include "common/dropout.cuh"
#include "common/sequence.cuh"
#include "dispatch.h"
#include "sm90/pipeline.cuh"
#include "sm90/sequence_tiles.cuh"
#include "sm90/shared_matrix.cuh"
#include "sm90/tiles.h"
#include "sm90/work_place.cuh"

namespace jfa::sm90 {

constexpr int kOutputRows = 16;  // of a warp: it stores them by itself

constexpr int kStagedPlaces = 2;  // for the tiles of a warpgroup; tiles of a bias take both

struct ForwardArguments {
  TensorMap q, k, v, o, scores;
  Problem p;
  WorkOrder order;
  SequenceTiles tiles;
  uint32_t* counter;  // of items drawn; 0 before and after
  StagedScores staged;
  int staged_row_mask;
};

// One item as the roles see it: computed once, by the warp that loads.
struct ForwardItem {
  int first_row;  // of the query tile; negative: there is no more work
  int head, batch;
  int q_begin, q_len, k_begin, k_len, offset;  // as in Sequence
  int stop;                                    // of rows that are written
  int first_key, key_tiles;                    // at least one tile, so that every row gets its zeros
  int sink_end;                                // where tiles with sinks end, if any, and those from first_key on follow
};
// Published items stay readable while the next three are: the epilogue of one runs when its successor has been taken,
// and two more may have been published.
constexpr int kItems = 4;
constexpr int kItemBytes = 64;
// Behind it, where kAnyVisibility, the sink of its head: in log2 units, -inf for none.
constexpr int kItemSink = sizeof(ForwardItem);
static_assert(kItemSink + sizeof(float) <= kItemBytes, "an item and its sink do not fit their place");

template <class Shape>
struct ForwardSmem {
  using Output = Tile<kOutputRows, Shape::kValueDim>;
  using StagedBias = Tile<kWarpgroupRows, Shape::kK>;
  using StagedMask = ByteTile<kWarpgroupRows, Shape::kK>;
  struct Outputs {
    Output output[Shape::kWarpgroups * 4];  // of each warp
  };
  struct Scores {
    StagedBias scores[Shape::kWarpgroups];
  };
  struct NoOutputs {};
  struct NoScores {};
  struct Staged : std::conditional_t<Shape::kStagesScores, Scores, NoScores>,
                  std::conditional_t<Shape::kStoreByTma, Outputs, NoOutputs> {};

  Tile<Shape::kQ, Shape::kHeadDim> q[Shape::kQueryPlaces];
  alignas(kSwizzleBytes) unsigned char ring[Shape::kSlots][Shape::kSlotBytes];
  Staged staged;
  // Each for every kQueryPlaces-th item. q_free: also the item has been read.
  alignas(8) uint64_t item_ready[Shape::kQueryPlaces], q_full[Shape::kQueryPlaces], q_free[Shape::kQueryPlaces];
  uint64_t full[Shape::kSlots], free[Shape::kSlots];
  uint64_t staged_full[Shape::kWarpgroups][kStagedPlaces], staged_free[Shape::kWarpgroups][kStagedPlaces];
  // A tile of V that has to be cleaned before it is full. The other block of a cluster may already load the next one.
  uint64_t landed[Shape::kSlots];
  uint64_t drawn_ready[kItems];  // in the second block of a cluster: the number that the first has drawn for both
  uint32_t drawn[kItems];
  alignas(kItemBytes) unsigned char items[kItems][kItemBytes];
};

// The first key of an item's first tile, of the tile after one, and of what would come after the last.
__device__ __forceinline__ int first_tile(const ForwardItem& item) { return item.sink_end > 0 ? 0 : item.first_key; }
template <class Shape>
__device__ __forceinline__ int next_tile(const ForwardItem& item, int j) {
  return item.sink_end > 0 && j + Shape::kK == item.sink_end ? item.first_key : j + Shape::kK;
}
template <class Shape>
__device__ __forceinline__ int end_of_tiles(const ForwardItem& item) {
  return item.first_key + item.key_tiles * Shape::kK - item.sink_end;
}

// Of an item and its queries, which item_ready and q_full bring.
template <class Shape>
using QueryPlace = RingPosition<Shape::kQueryPlaces>;

template <class Smem>
__device__ __forceinline__ uint32_t item_address(const Smem& smem, unsigned count) {
  return shared_address(smem.items) + count % kItems * kItemBytes;
}

// The item with that number, as block `rank` of a cluster works on it: sections of heads, in each of them the last
// query tiles of all heads first. `keys` are those that the rows of the whole cluster see, but for sinks.
template <class Shape, class Arguments>
__device__ __forceinline__ ForwardItem forward_item(const Arguments& a, const WorkOrder& order, int number, int rank,
                                                    Interval& keys) {
  const WorkPlace place = place_of(order, number, a.p.shape.batch);
  const bool pair = Shape::kClusterQ > Shape::kQ && order.item_heads > 1;  // of heads
  const int cluster_rows = pair ? Shape::kQ : Shape::kClusterQ;
  ForwardItem item;
  item.batch = place.batch;
  item.head = place.head + (pair ? rank : 0);
  const SequenceTile tile =
      tile_of_item<Shape>(a, place, (order.tiles - 1 - place.tile) * cluster_rows, a.p.shape.q_len);
  set_bounds(item, tile);
  item.first_row = tile.first + (pair ? 0 : rank * Shape::kQ);
  const Sequence sequence = sequence_of<Shape>(a.p, item);
  // Tiles that stage scores, and have two warps that load, would spill.
  keys = Shape::kStagesScores ? sequence.keys_of_rows(tile.first, tile.first + cluster_rows)
                              : sequence.keys_of_rows_by_warp(tile.first, tile.first + cluster_rows);
  const KeyTiles<Shape::kK> tiles(keys, sequence.sink_keys(), key_alignment(a.p.scores));
  const int outside = max(a.p.shape.k_len, 1);  // of the tensor, where zeros are loaded
  if (tiles.count == 0) keys = {outside, outside};
  item.first_key = tiles.count == 0 ? outside : tiles.sink_end > 0 ? tiles.resume : tiles.first;
  item.key_tiles = max(1, tiles.count);
  item.sink_end = tiles.sink_end;
  return item;
}

}  // namespace jfa::sm90

// Which tile of which head an item is.
#pragma once

#include "common/device.cuh"
#include "common/sequence.cuh"
#include "sm90/work_order.h"

namespace jfa::sm90 {

struct WorkPlace {
  int tile;         // the longest of a head are the first
  int head, batch;  // the first of the item's heads
  int rank;         // of the tile: those of a head with a lower one have lower numbers
};

// Of a head's tiles the one with that rank by length: the first of each sequence, the second of each, and so on.
__device__ __forceinline__ int tile_of_rank(const WorkOrder& order, int rank) {
  const int of_sequence = order.sequence_tiles;
  if (of_sequence == 0) return rank;
  const int sequences = order.tiles / of_sequence, rest = order.tiles % of_sequence;  // these are of one more sequence
  const int before = rest * (sequences + 1);
  if (rank < before) return rank / (sequences + 1) + rank % (sequences + 1) * of_sequence;
  return rest + (rank - before) / sequences + (rank - before) % sequences * of_sequence;
}

__device__ __forceinline__ WorkPlace place_of(const WorkOrder& order, int number, int batch) {
  const int section = min(number / (order.section_heads * order.tiles), order.sections);
  const int first_head = section * order.section_heads;
  const int heads = section < order.sections ? order.section_heads : order.heads - first_head;
  const int rest = number - first_head * order.tiles;
  const int head = first_head + rest % heads;
  const int heads_of_entry = order.heads / batch;
  const int entry = order.batch_fastest ? head % batch : head / heads_of_entry;
  const int of_entry = order.batch_fastest ? head / batch : head % heads_of_entry;
  return {tile_of_rank(order, rest / heads), of_entry * order.item_heads, entry, rest / heads};
}

// Who sees whom in the batch entry of an item, or in its one of several packed sequences.
template <class Shape, class Item>
__device__ __forceinline__ Sequence sequence_of(const Problem& p, const Item& item) {
  if constexpr (Shape::kAnyVisibility) return Sequence(p, item.batch, item.q_len, item.k_len);
  return Sequence(p, item.batch, {item.q_begin, item.q_len}, {item.k_begin, item.k_len}, item.offset);
}

}  // namespace jfa::sm90

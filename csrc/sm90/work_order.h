// In which order persistent blocks take their items: one each for a tile of a head of a batch entry.
//
// Heads are cut into sections that stay in the L2 together; within a section the longest tiles of all its heads come
// first. Where sequences with an edge on the right (causal ones) are packed into one, the host knows their number, and
// takes them for equally long: then the longest tiles of all sequences come first. The last section is as large as it
// takes to end evenly: with few items of each length, some block would still be busy with a long one when the others
// have ended.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace jfa::sm90 {

constexpr int64_t kMaxItems = 0x7fffffff - 4096;  // number + blocks fits an int

struct WorkOrder {
  int tiles = 0;  // of a head
  int heads = 0;  // counted over the batch, here and in a section in units of item_heads
  int items = 0;
  int item_heads = 1;      // of an item; two are for the two blocks of a cluster
  int sequence_tiles = 0;  // of each of the sequences, if there are several
  int section_heads = 1;
  int sections = 0;            // before the last one, which has the other heads
  bool batch_fastest = false;  // in the numbering of heads
  bool drawn = false;          // from a counter, by whichever block is free; otherwise dealt out in turn
};

// `fit`: heads that stay in the L2 together. A section has at least `least_items`. `listed`: tiles are those of
// sequence_tiles.h, the longest first already.
inline WorkOrder work_order(const Problem& p, int64_t heads, int64_t tiles, bool listed, int64_t fit,
                            int64_t least_items = 1) {
  constexpr int64_t kEvenItems = 264;  // two for each multiprocessor of an H200
  WorkOrder order;
  order.tiles = static_cast<int>(tiles);
  order.heads = static_cast<int>(heads);
  order.items = static_cast<int>(tiles * heads);
  if (order.items == 0) return order;
  if (!listed && p.visibility.sequences > 1 && p.visibility.window_right < p.shape.k_len)
    order.sequence_tiles = static_cast<int>((tiles + p.visibility.sequences - 1) / p.visibility.sequences);
  const int64_t section = std::min(std::max(fit, (least_items + tiles - 1) / tiles), heads);
  const int64_t last = std::min(std::max(section, (kEvenItems + tiles - 1) / tiles), heads);
  order.section_heads = static_cast<int>(section);
  order.sections = static_cast<int>((heads - last) / section);
  return order;
}

}  // namespace jfa::sm90

// The tiles of packed sequences, query rows or keys, for kernels that know who sees whom of one sequence only. It runs
// before them, on the same stream; one block a batch entry.
//
// Tile i of sequence n, which begins at token x, has slot x / size + n + i: those of different sequences do not meet,
// and so need not be counted first. What lies before the first sequence and after the last one, and only gets zeros,
// counts as two more sequences. Whatever the device's arrays hold, each token is in one tile, and all lies inside the
// tensors.
#pragma once

#include "common/math.cuh"
#include "common/sequence.cuh"
#include "launch.h"
#include "problem.h"
#include "sm90/sequence_tiles.h"
#include "sm90/work_place.cuh"

namespace jfa::sm90 {

constexpr int kSequenceTileThreads = 512;

struct SequenceTilesSmem {
  // Where each begins, on the side of the tiles: 0, what comes before them; then the sequences; then the rest.
  int own[kTiledSequences + 2];
  int others[kTiledSequences + 1];  // where sequences begin on the other side
  int lengths[kOrderedTiles];       // of slots: how much of that the tile looks at; -1: there is no tile
};

// Of a kernel's items: how many tiles there are, perhaps only the device knows.
template <class Shape, class Arguments>
__device__ __forceinline__ WorkOrder order_of(const Arguments& a) {
  WorkOrder order = a.order;
  if (!Shape::kAnyVisibility && a.tiles.count != nullptr) {
    order.tiles = load_global(a.tiles.count);
    order.items = order.tiles * order.heads;
  }
  return order;
}

__device__ __forceinline__ SequenceTile load_tile(const SequenceTiles& tiles, int b, int rank) {
  const int4* words = reinterpret_cast<const int4*>(tiles.tiles + int64_t(b) * tiles.slots + rank);
  const int4 x = load_global(words), y = load_global(words + 1);
  return {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
}

// The tile of an item: one of packed sequences, or else the one that begins with that token.
template <class Shape, class Arguments>
__device__ __forceinline__ SequenceTile tile_of_item(const Arguments& a, const WorkPlace& place, int first, int stop) {
  if (!Shape::kAnyVisibility && a.tiles.tiles != nullptr) return load_tile(a.tiles, place.batch, place.rank);
  const Sequence sequence(a.p, place.batch, Shape::kAnyVisibility);
  const int offset = Shape::kAnyVisibility ? 0 : sequence.offset;  // not used there: a register less
  return {first, stop, 0, sequence.q_len, 0, sequence.k_len, offset, 0};
}

// What an item has of its tile.
template <class Item>
__device__ __forceinline__ void set_bounds(Item& item, const SequenceTile& tile) {
  item.q_begin = tile.q_begin;
  item.q_len = tile.q_len;
  item.k_begin = tile.k_begin;
  item.k_len = tile.k_len;
  item.offset = tile.offset;
  item.stop = tile.stop;
}

// A warp: each becomes the largest of those up to it.
__device__ __forceinline__ void make_increasing(uint32_t numbers, int count) {
  int largest = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kWarpThreads) {
    const uint32_t at = numbers + 4 * (first + lane_index());
    const bool inside = first + lane_index() < count;
    int x = inside ? max(largest, int(load_shared_32(at))) : largest;
    for (int step = 1; step < kWarpThreads; step *= 2) {
      const int before = shuffle_from(x, max(lane_index() - step, 0));
      x = max(x, before);
    }
    if (inside) store_shared_32(at, x);
    largest = shuffle_from(x, kWarpThreads - 1);
  }
}

// The tile of a slot; there is none where its first token is `stop`.
__device__ __forceinline__ SequenceTile tile_of_slot(const SequenceTilesSmem& smem, const Sequence& sequence,
                                                     const SequenceTiles& tiles, int slot) {
  const Problem& p = sequence.p;
  const int sequences = p.visibility.sequences;
  const auto own = [&](int n) { return int(load_shared_32(shared_address(smem.own) + 4 * n)); };
  const auto other = [&](int n) { return int(load_shared_32(shared_address(smem.others) + 4 * n)); };
  int low = 0, high = sequences + 2;  // the last one whose first slot is not past this one
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (own(middle) / tiles.size + middle <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const bool is_last = low > sequences;
  const int begin = own(low), end = is_last ? (tiles.of_keys ? p.shape.k_len : p.shape.q_len) : own(low + 1);
  SequenceTile tile{};
  tile.first = min(begin + (slot - begin / tiles.size - low) * tiles.size, end);
  tile.stop = end;
  if (low == 0 || is_last) return tile;
  const Interval of_own{begin, end}, of_others{other(low - 1), other(low)};
  const Interval &rows = tiles.of_keys ? of_others : of_own, &keys = tiles.of_keys ? of_own : of_others;
  tile.q_begin = rows.begin;
  tile.q_len = min(rows.end, sequence.q_len);
  tile.k_begin = keys.begin;
  tile.k_len = min(keys.end, sequence.k_len);
  tile.offset = p.visibility.bottom_right ? keys.end - rows.end : keys.begin - rows.begin;
  return tile;
}

// `counter`: if there is one, that of the kernel that follows, which becomes 0 here.
template <class Family>
__global__ void __launch_bounds__(kSequenceTileThreads)
    tile_sequences(const __grid_constant__ Problem p, const __grid_constant__ SequenceTiles tiles, uint32_t* counter) {
  const SequenceTilesSmem& smem = shared_memory<SequenceTilesSmem>();
  const uint32_t own = shared_address(smem.own), others = shared_address(smem.others);
  const uint32_t lengths = shared_address(smem.lengths);
  const int b = block_index(), sequences = p.visibility.sequences;
  const Sequence sequence(p, b, false);
  const auto clamp = [](int x, int most) { return min(max(x, 0), most); };
  for (int n = thread_index(); n <= sequences; n += kSequenceTileThreads) {
    const int64_t at = int64_t(b) * (sequences + 1) + n;
    const int row = load_global(p.visibility.cu_q + at), key = load_global(p.visibility.cu_k + at);
    store_shared_32(own + 4 * (n + 1), tiles.of_keys ? clamp(key, sequence.k_len) : clamp(row, sequence.q_len));
    store_shared_32(others + 4 * n, clamp(tiles.of_keys ? row : key, kMaxSequence));
  }
  if (thread_index() == 0) {
    store_shared_32(own, 0);
    if (counter != nullptr && b == 0) store_global(counter, 0u);
  }
  barrier();
  if (warp_index() == 0) make_increasing(own, sequences + 2);
  barrier();

  const bool orders = tiles.slots <= kOrderedTiles;
  for (int slot = thread_index(); orders && slot < tiles.slots; slot += kSequenceTileThreads) {
    const SequenceTile tile = tile_of_slot(smem, sequence, tiles, slot);
    const Sequence of_tile(p, b, {tile.q_begin, tile.q_len}, {tile.k_begin, tile.k_len}, tile.offset);
    const int end = tile.first + tiles.size;
    const Interval seen = tiles.of_keys ? of_tile.rows_of_keys(tile.first, end) : of_tile.keys_of_rows(tile.first, end);
    store_shared_32(lengths + 4 * slot, tile.first < tile.stop ? max(seen.end - seen.begin, 0) : -1);
  }
  barrier();
  for (int slot = thread_index(); slot < tiles.slots; slot += kSequenceTileThreads) {
    // Under causality the last rows look at most keys, and the first keys are looked at by most rows.
    int rank = tiles.of_keys ? slot : tiles.slots - 1 - slot;
    int count = tiles.slots;
    if (orders) {
      const int length = load_shared_32(lengths + 4 * slot);
      rank = count = 0;
      for (int n = 0; n < tiles.slots; ++n) {
        const int other = load_shared_32(lengths + 4 * n);
        rank += other > length || (other == length && n > slot);
        count += other >= 0;
      }
    }
    const SequenceTile tile = tile_of_slot(smem, sequence, tiles, slot);
    int4* words = reinterpret_cast<int4*>(tiles.tiles + int64_t(b) * tiles.slots + rank);
    store_global(words, int4{tile.first, tile.stop, tile.q_begin, tile.q_len});
    store_global(words + 1, int4{tile.k_begin, tile.k_len, tile.offset, 0});
    if (slot == 0 && tiles.count != nullptr) store_global(tiles.count, count);
  }
}

// For the kernel that follows, whose items `order` numbers. `size`: of a tile. `counter`: see above.
template <class Family>
Status launch_tile_sequences(SequenceTiles& tiles, const Problem& p, const WorkOrder& order, int size, bool of_keys,
                             cudaStream_t stream, uint32_t* counter = nullptr) {
  int* count = p.visibility.table;  // the first record of the scratch
  tiles.tiles = reinterpret_cast<SequenceTile*>(count + 4);
  tiles.count = p.shape.batch == 1 ? count : nullptr;
  tiles.slots = order.tiles;
  tiles.size = size;
  tiles.of_keys = of_keys;
  return launch("jax_flashattn sm90 tile_sequences", tile_sequences<Family>,
                Grid{p.shape.batch, kSequenceTileThreads, sizeof(SequenceTilesSmem)}, stream, p, tiles, counter);
}

}  // namespace jfa::sm90

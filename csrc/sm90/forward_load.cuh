// The role of the warp that loads in the Hopper forward: it numbers the items, publishes them, and brings queries, keys
// and values.
#pragma once

#include "sm90/forward_work.cuh"

namespace jfa::sm90 {

template <class Shape>
__device__ __forceinline__ void load_forward(const ForwardArguments& a, ForwardSmem<Shape>& smem) {
  using QueryTile = Tile<Shape::kQ, Shape::kHeadDim>;
  using KeyTile = Tile<Shape::kK, Shape::kHeadDim>;
  using ValueTile = Tile<Shape::kK, Shape::kValueDim>;
  const uint32_t landed = shared_address(smem.landed);
  const uint32_t ring = shared_address(smem.ring), full = shared_address(smem.full), free = shared_address(smem.free);
  RingPosition<Shape::kSlots> at(1);
  const WorkOrder order = order_of<Shape>(a);
  uint32_t landed_parities = 0;  // a bit for each place

  const int rank = Shape::kCluster > 1 ? cluster_rank() : 0;
  const int cluster = block_index() / Shape::kCluster;
  const int clusters = grid_blocks() / Shape::kCluster;

  // A tile of keys or values: in a cluster this block loads its share of the chunks, into both blocks.
  const auto load_shared = [&](auto type, const TensorMap& map, uint32_t to, uint32_t mbarrier, int row, int head,
                               int batch) {
    using Tile = typename decltype(type)::type;
    constexpr int kShare = Tile::kChunks / Shape::kCluster;
    if (!elect_one()) return;
    mbarrier_arrive_expect(mbarrier, Tile::kBytes);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int c = rank * kShare + i;
      if constexpr (Shape::kCluster > 1) {
        tma_load_multicast(to + c * Tile::kChunkBytes, map, mbarrier, c * kChunkCols, row, head, batch, 0b11);
      } else {
        tma_load(to + c * Tile::kChunkBytes, map, mbarrier, c * kChunkCols, row, head, batch);
      }
    }
  };
  const auto load_query = [&](const ForwardItem& item, int place) {
    if (!elect_one()) return;
    const uint32_t q_full = shared_address(&smem.q_full[place]);
    mbarrier_arrive_expect(q_full, QueryTile::kBytes);
#pragma unroll
    for (int c = 0; c < QueryTile::kChunks; ++c) {
      tma_load(shared_address(smem.q[place].bytes) + c * QueryTile::kChunkBytes, a.q, q_full, c * kChunkCols,
               item.first_row, item.head, item.batch);
    }
  };
  const auto load_keys = [&](int j, int head, int batch) {
    mbarrier_wait(free + 8 * at.slot, at.parity);
    load_shared(Type<KeyTile>{}, a.k, ring + at.slot * Shape::kSlotBytes, full + 8 * at.slot, j, head, batch);
    at.advance();
  };
  // Rows that no query of the tile sees become zeros: what lies there belongs to others, and 0 x NaN is NaN. `gaps`:
  // the item's keys have some between them, and it has to be asked where.
  const auto needs_cleaning = [&](int j, const Interval& keys, const ForwardItem& item, bool gaps) {
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    // Past the tensor TMA writes zeros.
    return looks_past<Shape::kK>(keys, sequence.sink_keys(), key_alignment(a.p.scores), j, a.p.shape.k_len) ||
           (gaps && sequence.has_unseen_keys(j, j + Shape::kK));
  };
  const auto load_values = [&](int j, const Interval& keys, int head, const ForwardItem& item, bool cleans) {
    mbarrier_wait(free + 8 * at.slot, at.parity);
    const uint32_t to = ring + at.slot * Shape::kSlotBytes;
    if (!cleans) {
      load_shared(Type<ValueTile>{}, a.v, to, full + 8 * at.slot, j, head, item.batch);
    } else {
      load_shared(Type<ValueTile>{}, a.v, to, landed + 8 * at.slot, j, head, item.batch);
      mbarrier_wait(landed + 8 * at.slot, landed_parities >> at.slot & 1);
      landed_parities ^= 1u << at.slot;
      const Sequence sequence = sequence_of<Shape>(a.p, item);
      const int sinks = sequence.sink_keys();
      clean_rows<ValueTile>(to, [&](int row) { return looks_at(keys, sinks, j + row) && sequence.is_seen(j + row); });
      fence_async_shared();
      arrive_for_warp(full + 8 * at.slot);
    }
    at.advance();
  };

  // The number of the item after this one, the `round`-th. In a cluster the first block draws for both, and sends it
  // on.
  const auto draw = [&] {
    // items - 1 is drawn last, and leaves the counter at 0: each worker draws once for each of its items.
    return clusters + int(increment_global(a.counter, order.items - 1));
  };
  const auto send = [&](int drawn, unsigned round) {
    const int mailbox = round % kItems;
    store_remote_32(shared_address(&smem.drawn[mailbox]), drawn, shared_address(&smem.drawn_ready[mailbox]), 1);
  };
  const auto receive = [&](unsigned round) {
    const int mailbox = round % kItems;
    const uint32_t ready = shared_address(&smem.drawn_ready[mailbox]);
    if (elect_one()) mbarrier_arrive_expect(ready, 4);
    mbarrier_wait(ready, round / kItems % 2);
    return int(load_shared_32(shared_address(&smem.drawn[mailbox])));
  };
  // In the phase before theirs the place of the `round`-th item's queries becomes free.
  const auto q_free = [&](const QueryPlace<Shape>& queries) { return shared_address(&smem.q_free[queries.slot]); };
  // Tells the warpgroups of that item, when its queries may be loaded; without one, that there is no more.
  const auto publish = [&](const ForwardItem& item, unsigned round) {
    const auto queries = QueryPlace<Shape>::of(round);
    mbarrier_wait(q_free(queries), queries.parity ^ 1);
    if (lane_index() == 0) {
      store_item(item_address(smem, round), item);
      if (Shape::kAnyVisibility && item.first_row >= 0) {
        store_shared_f32(item_address(smem, round) + kItemSink, sink_log2(a.p.scores.sinks, item.batch, item.head));
      }
      mbarrier_arrive(shared_address(&smem.item_ready[queries.slot]));
    }
    warp_barrier();
    if (item.first_row >= 0) load_query(item, queries.slot);
  };

  int number = cluster;
  Interval keys{};
  ForwardItem item{-1};
  if (number < order.items) item = forward_item<Shape>(a, order, number, rank, keys);
  publish(item, 0);
#pragma unroll 1
  for (unsigned round = 0; item.first_row >= 0; ++round) {
    const ForwardItem now = item;
    const int kv_head = now.head / (a.p.shape.heads / a.p.shape.kv_heads);
    // A long item draws the next one late: one drawn early would wait while other blocks have nothing. A short one
    // draws at once, or the next queries would be late.
    const int draw_tile = now.key_tiles > 16 ? now.key_tiles - 8 : 0;
    const bool draws = order.drawn && rank == 0 && lane_index() == 0;
    int drawn = draws && draw_tile == 0 ? draw() : 0;
    int j = first_tile(now);
    load_keys(j, kv_head, now.batch);
    if (Shape::kCluster > 1 && draws && draw_tile == 0) send(drawn, round);

    const Interval now_keys = keys;
    const bool gaps = sequence_of<Shape>(a.p, now).has_unseen_keys(first_tile(now), now_keys.end);
    const auto find_next = [&] {
      number = !order.drawn ? number + clusters : rank == 0 ? int(broadcast(drawn)) : receive(round);
      item.first_row = -1;
      if (number < order.items) item = forward_item<Shape>(a, order, number, rank, keys);
    };
    // Queries of the next item follow as soon as there is place for them: they come from far, and are needed at once.
    const auto next = QueryPlace<Shape>::of(round + 1);
    bool published = false;
#pragma unroll 1
    for (int t = 1;; ++t) {
      const bool ends = t == now.key_tiles;
      if (!published && (ends || t > draw_tile)) {
        published = broadcast(mbarrier_test(q_free(next), next.parity ^ 1));
        if (published || ends) find_next();
        if (published) publish(item, round + 1);
      }
      if (draws && t == draw_tile) drawn = draw();
      const int last = j;
      const bool cleans =
          needs_cleaning(last, now_keys, now, gaps);  // found out while there is no place to load anything to
      if (!ends) {
        j = next_tile<Shape>(now, j);
        load_keys(j, kv_head, now.batch);
      }
      load_values(last, now_keys, kv_head, now, cleans);
      if (ends) break;
      if (Shape::kCluster > 1 && draws && t == draw_tile) send(drawn, round);
    }
    if (!published) publish(item, round + 1);
  }
}

}  // namespace jfa::sm90

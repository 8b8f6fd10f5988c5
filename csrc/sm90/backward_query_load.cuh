// dQ: the warps that load. Its schedule is described in backward_query.cuh.
#pragma once

#include "sm90/backward_query_work.cuh"
#include "sm90/forward_staged.cuh"

namespace jfa::sm90 {

// The role of the warp that numbers the work, and loads all but what is staged.
template <class Shape>
__device__ __forceinline__ void load_backward_query(const BackwardQueryArguments& a, BackwardQuerySmem<Shape>& smem) {
  using Smem = BackwardQuerySmem<Shape>;
  using Rows = typename Smem::Rows;
  using Keys = typename Smem::Keys;
  using Values = typename Smem::Values;
  const uint32_t landed = shared_address(&smem.landed);
  RingPosition<Shape::kKeyPlaces> k_at(1);
  RingPosition<Shape::kValuePlaces> v_at(1);
  uint32_t rows_parity = 1, landed_parity = 0;
  unsigned published = 0;

  // All chunks of a tile; one lane calls it.
  const auto load_chunks = [](auto& tile, const TensorMap& map, uint32_t mbarrier, int row, int head, int batch) {
    using Tile = std::remove_reference_t<decltype(tile)>;
#pragma unroll
    for (int c = 0; c < Tile::kChunks; ++c) {
      tma_load(shared_address(tile.bytes) + c * Tile::kChunkBytes, map, mbarrier, c * kChunkCols, row, head, batch);
    }
  };
  const auto load_rows = [&](const ForwardItem& item) {
#pragma unroll
    for (int w = 0; w < Shape::kWarpgroups; ++w) {
      const uint32_t full = shared_address(&smem.rows_full[w]);
      Rows& rows = smem.rows[w];
      mbarrier_wait(shared_address(&smem.rows_free[w]), rows_parity);
      if (elect_one()) {
        const int row = item.first_row + w * kWarpgroupRows;
        mbarrier_arrive_expect(full, sizeof(Rows));
        load_chunks(rows.q, a.q, full, row, item.head, item.batch);
        load_chunks(rows.d_o, a.d_o, full, row, item.head, item.batch);
      }
    }
    rows_parity ^= 1;
  };
  // Rows of K that no query of the tile sees become zeros: what lies there belongs to others, and 0 x NaN is NaN. Of V
  // they may stay: their dP is masked.
  const auto load_keys = [&](int j, const Interval& keys, int head, const ForwardItem& item) {
    const uint32_t full = shared_address(&smem.k_full[k_at.slot]);
    Keys& k = smem.k[k_at.slot];
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    const int sinks = sequence.sink_keys();
    // Past the tensor TMA writes zeros.
    const bool clean = looks_past<Shape::kK>(keys, sinks, key_alignment(a.p.scores), j, a.p.shape.k_len) ||
                       sequence.has_unseen_keys(j, j + Shape::kK);
    const uint32_t arrived = clean ? landed : full;
    mbarrier_wait(shared_address(&smem.k_free[k_at.slot]), k_at.parity);
    if (elect_one()) {
      mbarrier_arrive_expect(arrived, Keys::kBytes);
      load_chunks(k, a.k, arrived, j, head, item.batch);
    }
    if (clean) {
      mbarrier_wait(landed, landed_parity);
      landed_parity ^= 1;
      clean_rows<Keys>(shared_address(k.bytes),
                       [&](int row) { return looks_at(keys, sinks, j + row) && sequence.is_seen(j + row); });
      fence_async_shared();
      arrive_for_warp(full);
    }
    k_at.advance();
  };
  const auto load_values = [&](int j, int head, int batch) {
    const uint32_t full = shared_address(&smem.v_full[v_at.slot]);
    mbarrier_wait(shared_address(&smem.v_free[v_at.slot]), v_at.parity);
    if (elect_one()) {
      mbarrier_arrive_expect(full, Values::kBytes);
      load_chunks(smem.v[v_at.slot], a.v, full, j, head, batch);
    }
    v_at.advance();
  };
  const auto publish = [&](const ForwardItem& item) {
    if (lane_index() == 0) {
      store_item(item_address(smem, published), item);
      mbarrier_arrive(shared_address(&smem.item_ready[published % kItems]));
    }
    warp_barrier();
    ++published;
  };

  const WorkOrder order = order_of<Shape>(a);
  int number = block_index();
  Interval keys{};
  ForwardItem item{};
  if (number < order.items) item = forward_item<Shape>(a, order, number, 0, keys);
#pragma unroll 1
  while (number < order.items) {
    // The next item is drawn late: one drawn early would wait while other blocks have nothing.
    int drawn = 0;
    const int draw_tile = max(item.key_tiles - 2, 1);
    const auto draw = [&] {
      if (!order.drawn || lane_index() != 0) return;
      drawn = grid_blocks() + int(increment_global(a.counter, order.items - 1));
    };
    const int kv_head = item.head / (a.p.shape.heads / a.p.shape.kv_heads);
    publish(item);
    int j = first_tile(item);
    load_keys(j, keys, kv_head, item);
    load_rows(item);
#pragma unroll 1
    for (int t = 1; t < item.key_tiles; ++t) {
      if (t == draw_tile) draw();
      load_values(j, kv_head, item.batch);
      j = next_tile<Shape>(item, j);
      load_keys(j, keys, kv_head, item);
    }
    if (item.key_tiles == 1) draw();
    // The next item is worked out before the last load, which has to wait for its place anyway.
    number = order.drawn ? int(broadcast(drawn)) : number + grid_blocks();
    const int last_batch = item.batch;
    if (number < order.items) item = forward_item<Shape>(a, order, number, 0, keys);
    load_values(j, kv_head, last_batch);
  }
  publish(ForwardItem{-1});
}

// The role of the warp that loads a bias or a mask.
template <class Shape>
__device__ __forceinline__ void load_staged(const BackwardQueryArguments& a, BackwardQuerySmem<Shape>& smem) {
  uint32_t number = 0;
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    mbarrier_wait(shared_address(&smem.item_ready[taken % kItems]), taken / kItems % 2);
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken));
    if (item.first_row < 0) break;
    warp_barrier();  // before its place is written again, its rows are given back, by those who wait for these tiles
    load_staged_of_item<Shape>(a, smem, item, number);
  }
}

}  // namespace jfa::sm90

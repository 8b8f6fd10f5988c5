// Wide backward: the warps that load. Its schedule is described in backward_wide.cuh.
#pragma once

#include "common/softmax.cuh"
#include "sm90/backward_wide_work.cuh"

namespace jfa::sm90 {

// The role of a warp that loads. That of the queries also numbers the work; in a cluster the first block does for both.
template <class Shape, bool kOfQueries>
__device__ __forceinline__ void load_stream(const BackwardWideArguments& a, BackwardWideSmem<Shape>& smem) {
  using Stream = BackwardWideStream<Shape, kOfQueries>;
  using Resident = typename Stream::Resident;
  using Streamed = typename Stream::Streamed;
  const Stream stream(smem);
  const uint32_t items = shared_address(smem.items);
  const uint32_t item_full = shared_address(smem.item_full), item_free = shared_address(smem.item_free);
  const jfa::Shape& shape = a.p.shape;
  const int group = shape.heads / shape.kv_heads;
  RingPosition<Stream::kStages> at(1);
  RingPosition<kBackwardWideItems> item_at(kOfQueries ? 1 : 0);
  uint32_t resident_parity = 1, landed_parities = 0;  // the latter a bit for each stage
  const int rank = Shape::kCluster > 1 ? cluster_rank() : 0;
  const int clusters = grid_blocks() / Shape::kCluster;
  int number = block_index() / Shape::kCluster;
  const WorkOrder order = order_of<Shape>(a);

  // Rows from `row` on, with their statistics. Rows that see no key of the item become zeros: what lies there belongs
  // to others, and 0 x NaN is NaN. Past the tensor TMA writes zeros. In a cluster each block cleans its own copy.
  const auto load_rows = [&](int row, int head, const BackwardWideItem& item) {
    const int batch = item.batch, first_row = item.first_row, end_row = item.end_row;
    constexpr int kRowsPerLane = Shape::kQ / kWarpThreads;
    const float* source =
        (kOfQueries ? a.p.lse : a.g.delta) + (int64_t(batch) * shape.heads + head) * shape.q_len + row;
    float statistics[kRowsPerLane];
#pragma unroll
    for (int n = 0; n < kRowsPerLane; ++n) {
      const int x = lane_index() + n * kWarpThreads;
      const bool inside = row + x >= first_row && row + x < end_row;
      statistics[n] = inside ? load_global(source + x) : kOfQueries ? minus_infinity() : 0.0f;
    }
    mbarrier_wait(stream.free + 8 * at.slot, at.parity);
#pragma unroll
    for (int n = 0; n < kRowsPerLane; ++n) {
      store_shared_f32(stream.statistics + (at.slot * Shape::kQ + lane_index() + n * kWarpThreads) * 4,
                       kOfQueries ? lse_in_log2_units(statistics[n]) : statistics[n]);
    }
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    const bool whole = first_row <= row && end_row >= min(row + Shape::kQ, shape.q_len) &&
                       !sequence.has_blind_rows(row, row + Shape::kQ);
    const uint32_t full = stream.full + 8 * at.slot, landed = stream.landed + 8 * at.slot;
    arrive_for_lane(full);  // the statistics
    const uint32_t to = stream.streamed + at.slot * Streamed::kBytes;
    if (elect_one()) {
      const uint32_t mbarrier = whole ? full : landed;
      const TensorMap& map = kOfQueries ? a.q : a.d_o;
      mbarrier_arrive_expect(mbarrier, Streamed::kBytes);
#pragma unroll
      for (int n = 0; n < ceil_div(Streamed::kChunks, Shape::kCluster); ++n) {
        // Where the number of chunks is odd, the first block loads one more of Q, and the second of dO.
        const int c = n * Shape::kCluster + (kOfQueries ? rank : Shape::kCluster - 1 - rank);
        if constexpr (Shape::kCluster > 1) {
          if (c >= Streamed::kChunks) break;
          tma_load_multicast(to + c * Streamed::kChunkBytes, map, mbarrier, c * kChunkCols, row, head, batch, 0b11);
        } else {
          tma_load(to + c * Streamed::kChunkBytes, map, mbarrier, c * kChunkCols, row, head, batch);
        }
      }
    }
    if (!whole) {
      mbarrier_wait(landed, landed_parities >> at.slot & 1);
      landed_parities ^= 1 << at.slot;
      clean_rows<Streamed>(to,
                           [&](int x) { return row + x >= first_row && row + x < end_row && sequence.sees(row + x); });
      fence_async_shared();
      arrive_for_warp(full);
    }
    at.advance();
  };
  const auto load_resident = [&](int first_key, int head, int batch) {
    mbarrier_wait(stream.resident_free, resident_parity);
    resident_parity ^= 1;
    if (!elect_one()) return;
    mbarrier_arrive_expect(stream.resident_full, Resident::kBytes);
#pragma unroll
    for (int c = 0; c < Resident::kChunks; ++c) {
      tma_load(stream.resident + c * Resident::kChunkBytes, kOfQueries ? a.k : a.v, stream.resident_full,
               c * kChunkCols, first_key, head, batch);
    }
  };
  // What the first block of a cluster has drawn during an item, for both.
  const auto send = [&](int drawn, int mailbox) {
    store_remote_32(shared_address(&smem.drawn[mailbox]), drawn, shared_address(&smem.drawn_ready[mailbox]), 1);
  };
  const auto receive = [&](int mailbox, uint32_t parity) {
    const uint32_t ready = shared_address(&smem.drawn_ready[mailbox]);
    if (elect_one()) mbarrier_arrive_expect(ready, 4);
    mbarrier_wait(ready, parity);
    const int drawn = load_shared_32(shared_address(&smem.drawn[mailbox]));
    warp_barrier();
    if (elect_one()) mbarrier_arrive_remote(item_free + 8 * mailbox, 0);
    return drawn;
  };

#pragma unroll 1
  while (true) {
    const uint32_t item_bytes = items + item_at.slot * kBackwardWideItemWords * 4;
    BackwardWideItem item;
    if constexpr (kOfQueries) {
      item = backward_wide_item<Shape>(a, order, number, rank);
      mbarrier_wait(item_free + 8 * item_at.slot, item_at.parity);
      if (lane_index() == 0) {
        store_item(item_bytes, item);
        mbarrier_arrive(item_full + 8 * item_at.slot);
      }
      warp_barrier();
    } else {
      mbarrier_wait(item_full + 8 * item_at.slot, item_at.parity);
      item = load_item<BackwardWideItem>(item_bytes);
      arrive_for_lane(item_free + 8 * item_at.slot);
    }
    if (item.first_key < 0) break;
    bool first = true;
#pragma unroll 1
    for (int head = item.head * group; head < (item.head + 1) * group; ++head) {
      int row = first_tile_row(a, item);
#pragma unroll 1
      do {
        load_rows(row, head, item);
        if (first) load_resident(item.first_key, item.head, item.batch);
        first = false;
        row += Shape::kQ;
      } while (row < item.end_row);
    }
    if constexpr (kOfQueries) {
      // Late, with the loads of the last steps under way: an item drawn early would wait while others have nothing.
      int drawn = 0;
      if (rank == 0 && lane_index() == 0) {
        drawn = clusters + int(increment_global(a.counter, 0xffffffff));
        if (Shape::kCluster > 1) send(drawn, item_at.slot);
      }
      number = rank == 0 ? int(broadcast(drawn)) : receive(item_at.slot, item_at.parity ^ 1);
    }
    item_at.advance();
  }
}

// The role of the warp that loads a bias or a mask: of each tile of queries the part of this block's keys.
template <class Shape>
__device__ __forceinline__ void load_staged(const BackwardWideArguments& a, BackwardWideSmem<Shape>& smem) {
  const int group = a.p.shape.heads / a.p.shape.kv_heads;
  RingPosition<Shape::kQueryStages> at(1);
  RingPosition<kBackwardWideItems> item_at(0);
#pragma unroll 1
  for (;; item_at.advance()) {
    mbarrier_wait(shared_address(&smem.item_full[item_at.slot]), item_at.parity);
    const BackwardWideItem item = load_item<BackwardWideItem>(shared_address(smem.items[item_at.slot]));
    arrive_for_lane(shared_address(&smem.item_free[item_at.slot]));
    if (item.first_key < 0) break;
#pragma unroll 1
    for (int head = item.head * group; head < (item.head + 1) * group; ++head) {
      int row = first_tile_row(a, item);
#pragma unroll 1
      for (int tile = 0; tile < item.tiles; ++tile, row += Shape::kQ, at.advance()) {
        mbarrier_wait(shared_address(&smem.q_free[at.slot]), at.parity);
        if (!elect_one()) continue;
        load_staged_tile<BackwardWideSmem<Shape>>(a, shared_address(smem.scores[at.slot].bytes),
                                                  shared_address(&smem.q_full[at.slot]), item.first_key, row, head,
                                                  item.batch);
      }
    }
  }
}

}  // namespace jfa::sm90

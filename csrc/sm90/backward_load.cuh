// The roles of the Hopper backward up to head dims of 128 that bring what the others compute with.
#pragma once

#include "common/softmax.cuh"
#include "sm90/backward_work.cuh"

namespace jfa::sm90 {

// The role of the warp that loads.
template <class Shape>
__device__ __forceinline__ void load_backward(const BackwardArguments& a, BackwardSmem<Shape>& smem) {
  using KeyTile = decltype(smem.k);
  using QueryTile = Tile<Shape::kQ, Shape::kHeadDim>;
  const uint32_t landed = shared_address(&smem.landed);
  RingPosition<Shape::kStages> at(1);
  uint32_t landed_parity = 0;

  // Rows of a tile that take no part become zeros: what lies there belongs to others, and 0 x NaN is NaN. Those are
  // rows outside `part`, and in it, where there are `gaps`, those of which takes_part() says so.
  const auto load_tile = [&](auto type, const TensorMap& map, uint32_t to, uint32_t full, int first, Interval part,
                             int length, bool gaps, const auto& takes_part, int head, int batch) {
    using Tile = typename decltype(type)::type;
    // Past `length`, the tensor's own, TMA writes zeros.
    const bool clean = first < part.begin || part.end < min(first + Tile::kRows, length) || gaps;
    if (elect_one()) {
      const uint32_t mbarrier = clean ? landed : full;
      mbarrier_arrive_expect(mbarrier, Tile::kBytes);
#pragma unroll
      for (int c = 0; c < Tile::kChunks; ++c) {
        tma_load(to + c * Tile::kChunkBytes, map, mbarrier, c * kChunkCols, first, head, batch);
      }
    }
    if (!clean) return;
    mbarrier_wait(landed, landed_parity);
    landed_parity ^= 1;
    clean_rows<Tile>(to, [&](int row) { return part.contains(first + row) && takes_part(first + row); });
    fence_async_shared();
    arrive_for_warp(full);
  };

  // In deterministic mode blocks wait for others that have items with lower numbers. No block may then have an item
  // from the start: it might not be running, and never come to, while those that wait have all multiprocessors.
  const int dealt = a.g.deterministic ? 0 : grid_blocks();
  const auto draw = [&] {
    int drawn = 0;
    if (lane_index() == 0) drawn = dealt + int(increment_global(a.g.counters, 0xffffffff));
    return int(broadcast(drawn));
  };
  const WorkOrder order = order_of<Shape>(a);
  int number = a.g.deterministic ? draw() : block_index();
#pragma unroll 1
  for (unsigned published = 0;; ++published) {
    Interval rows{};
    BackwardItem item{-1};
    if (number < order.items) item = backward_item<Shape>(a, order, number, rows);
    if (lane_index() == 0) {
      store_item(shared_address(&smem.items[published % kBackwardItems]), item);
      mbarrier_arrive(shared_address(&smem.item_ready[published % kBackwardItems]));
    }
    warp_barrier();
    if (item.first_key < 0) break;
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    const bool gaps = sequence.has_blind_rows(rows.begin, rows.end);  // and it has to be asked in which tiles
    const auto load_rows = [&](const TensorMap& map, uint32_t to, uint32_t full, int h, int i) {
      load_tile(
          Type<QueryTile>{}, map, to, full, i, rows, a.p.shape.q_len, gaps && sequence.has_blind_rows(i, i + Shape::kQ),
          [&](int row) { return sequence.sees(row); }, h, item.batch);
    };
    const auto load_q = [&](int h, int i) {
      mbarrier_wait(shared_address(&smem.stage_free[at.slot]), at.parity);
      load_rows(a.q, shared_address(smem.q[at.slot].bytes), shared_address(&smem.q_full[at.slot]), h, i);
    };
    const auto load_d_o = [&](int h, int i) {
      load_rows(a.d_o, shared_address(smem.d_o[at.slot].bytes), shared_address(&smem.d_o_full[at.slot]), h, i);
    };
    const int group = a.p.shape.heads / a.p.shape.kv_heads;
    bool early = item.q_tiles > 0;  // the first Q is on its way while the item before is being finished
    if (early) load_q(item.kv_head * group, item.from_row);
    mbarrier_wait(shared_address(&smem.kv_free), published % 2 ^ 1);
    const Interval all{item.first_key, item.first_key + Shape::kK};
    const auto load_keys = [&](const TensorMap& map, uint32_t to, const Interval& part, bool gaps) {
      load_tile(
          Type<KeyTile>{}, map, to, shared_address(&smem.kv_full), item.first_key, part, a.p.shape.k_len, gaps,
          [&](int key) { return sequence.is_seen(key); }, item.kv_head, item.batch);
    };
    const bool by_formula = sequence.is_formula() && item.q_tiles > 0;
    load_keys(a.k, shared_address(smem.k.bytes), by_formula ? sequence.keys_of_rows(rows.begin, rows.end) : all,
              sequence.has_unseen_keys(all.begin, all.end));
    load_keys(a.v, shared_address(smem.v.bytes), all, false);
    arrive_for_lane(shared_address(&smem.kv_full));
#pragma unroll 1
    for (int h = item.kv_head * group; h < (item.kv_head + 1) * group; ++h) {
#pragma unroll 1
      for (int tile = 0; tile < item.q_tiles; ++tile) {
        const int i = item.from_row + tile * row_step<Shape>(a.g);
        if (!early) load_q(h, i);
        early = false;
        load_d_o(h, i);
        at.advance();
      }
    }
    // Drawn late, with the loads of two steps under way: one drawn early would wait while other blocks have nothing.
    number = draw();
  }
}

// The role of the warp that reads the rows' log-sum-exp and delta.
template <class Shape>
__device__ __forceinline__ void load_statistics(const BackwardArguments& a, BackwardSmem<Shape>& smem) {
  constexpr int kRowsPerLane = ceil_div(Shape::kQ, kWarpThreads);
  RingPosition<Shape::kStages> at(1);
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    const BackwardItem item = wait_for_item(smem, taken);
    if (item.first_key < 0) break;
    const int group = a.p.shape.heads / a.p.shape.kv_heads;
#pragma unroll 1
    for (int h = item.kv_head * group; h < (item.kv_head + 1) * group; ++h) {
#pragma unroll 1
      for (int tile = 0; tile < item.q_tiles; ++tile) {
        const int64_t origin = (int64_t(item.batch) * a.p.shape.heads + h) * a.p.shape.q_len;
        float lse[kRowsPerLane], delta[kRowsPerLane];
#pragma unroll
        for (int n = 0; n < kRowsPerLane; ++n) {
          const int i = item.from_row + tile * row_step<Shape>(a.g) + n * kWarpThreads + lane_index();
          const bool inside = i < item.q_len;
          lse[n] = inside ? load_global(a.p.lse + origin + i) : minus_infinity();
          delta[n] = inside ? load_global(a.g.delta + origin + i) : 0.0f;
        }
        mbarrier_wait(shared_address(&smem.stage_free[at.slot]), at.parity);
#pragma unroll
        for (int n = 0; n < kRowsPerLane; ++n) {
          const int row = n * kWarpThreads + lane_index();
          if (row >= Shape::kQ) continue;
          store_shared_f32(shared_address(&smem.rows[at.slot].lse_log2[row]), lse_in_log2_units(lse[n]));
          store_shared_f32(shared_address(&smem.rows[at.slot].delta[row]), delta[n]);
        }
        arrive_for_lane(shared_address(&smem.q_full[at.slot]));
        at.advance();
      }
    }
    leave_item(smem, taken);
  }
}

// The role of the warp that has key tiles add to dQ in the order of their ranks, in deterministic mode: it gives turns
// to those who compute, and tells other blocks how far they have come. A tile waits for the earlier ones of its head
// that have still to add to the same rows. They have lower numbers: their blocks are running, and do not wait for this
// one.
template <class Shape>
__device__ __forceinline__ void order_additions(const BackwardArguments& a, BackwardSmem<Shape>& smem) {
  RingPosition<BackwardSmem<Shape>::kDqTurns> turn(0);
  uint32_t added_parity = 0;
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    const BackwardItem item = wait_for_item(smem, taken);
    if (item.first_key < 0) break;
    // Where a formula says who sees whom, the rows of a tile neither begin nor end before those of an earlier one. The
    // last of these then answers for all.
    const bool in_order = a.tiles.tiles == nullptr && sequence_of<Shape>(a.p, item).is_formula();
    const int earliest = in_order ? max(item.rank - 1, 0) : 0;
    const int group = a.p.shape.heads / a.p.shape.kv_heads;
    const int first_row = item.from_row - (item.q_tiles - 1) * Shape::kQ;
    uint64_t* of_head =
        a.g.rows_to_come + (int64_t(item.batch) * a.p.shape.heads + item.kv_head * group) * a.order.tiles;
    const auto publish = [&](uint64_t* to, int end) {
      store_global_release(to + item.rank, RowsToCome{uint32_t(first_row), uint32_t(end)}.word());
    };
#pragma unroll 1
    for (int h = lane_index(); h < group; h += kWarpThreads) {
      publish(of_head + h * a.order.tiles, item.from_row + Shape::kQ);
    }
#pragma unroll 1
    for (int h = 0; h < group; ++h, of_head += a.order.tiles) {
      const auto is_free = [&](int i) {
        bool waits = false;
#pragma unroll 1
        for (int n = earliest + lane_index(); n < item.rank; n += kWarpThreads) {
          const RowsToCome earlier = RowsToCome::of(load_global_acquire(of_head + n));
          waits |= earlier.begin < i + Shape::kQ && earlier.end > i;
        }
        return !any_lane(waits);
      };
      const auto give_turn = [&] {
        arrive_for_warp(shared_address(&smem.dq_turn[turn.slot]));
        turn.advance();
      };
      bool given = false;
#pragma unroll 1
      for (int i = item.from_row; i >= first_row; i -= Shape::kQ) {
        if (!given) {
          while (!is_free(i)) continue;
          give_turn();
        }
        // Looked at before it is needed: this takes as long as the additions do.
        given = i > first_row && is_free(i - Shape::kQ);
        mbarrier_wait(shared_address(&smem.dq_added), added_parity);
        added_parity ^= 1;
        if (given) give_turn();
        if (lane_index() == 0) publish(of_head, i);
      }
    }
    leave_item(smem, taken);
  }
}

}  // namespace jfa::sm90

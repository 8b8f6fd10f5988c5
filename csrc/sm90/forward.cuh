// Forward, Hopper family:  O = softmax(scale Q K^T + bias, masked) V  and its log-sum-exp.
//
// Persistent blocks. Warp 0 loads by TMA, and numbers the work; the warpgroups that compute own 64 query rows each.
// K and V tiles share one ring, in the order of use: K0 K1 V0 K2 V1 ... K(n-1) V(n-2) V(n-1), then the next item's.
// A computing warpgroup issues S(t+1) = Q K' before O += P(t) V, and computes the softmax of t+1 under the latter. The
// warpgroups take turns at issuing, so that one's softmax runs under the other's products. Between two items the last
// product of the old and the first of the new run one after the other, and the old one's epilogue under them.
#pragma once

#include "common/dropout.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm90/forward_products.cuh"
#include "sm90/forward_staged.cuh"
#include "sm90/forward_store.cuh"
#include "sm90/forward_work.cuh"

namespace jfa::sm90 {

// The role of the warp that loads.
template <class Shape>
__device__ __forceinline__ void load_forward(const ForwardArguments& a, ForwardSmem<Shape>& smem) {
  using QueryTile = Tile<Shape::kQ, Shape::kHeadDim>;
  using KeyTile = Tile<Shape::kK, Shape::kHeadDim>;
  using ValueTile = Tile<Shape::kK, Shape::kValueDim>;
  const uint32_t q_full = shared_address(&smem.q_full), q_free = shared_address(&smem.q_free);
  const uint32_t item_ready = shared_address(&smem.item_ready), landed = shared_address(smem.landed);
  const uint32_t ring = shared_address(smem.ring), full = shared_address(smem.full), free = shared_address(smem.free);
  RingPosition<Shape::kSlots> at(1);
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
  const auto load_query = [&](const ForwardItem& item) {
    if (!elect_one()) return;
    mbarrier_arrive_expect(q_full, QueryTile::kBytes);
#pragma unroll
    for (int c = 0; c < QueryTile::kChunks; ++c) {
      tma_load(shared_address(smem.q.bytes) + c * QueryTile::kChunkBytes, a.q, q_full, c * kChunkCols, item.first_row,
               item.head, item.batch);
    }
  };
  const auto load_keys = [&](int j, int head, int batch) {
    mbarrier_wait(free + 8 * at.slot, at.parity);
    load_shared(Type<KeyTile>{}, a.k, ring + at.slot * Shape::kSlotBytes, full + 8 * at.slot, j, head, batch);
    at.advance();
  };
  // Rows that no query of the tile sees become zeros: what lies there belongs to others, and 0 x NaN is NaN.
  const auto load_values = [&](int j, const Interval& keys, int head, const ForwardItem& item) {
    mbarrier_wait(free + 8 * at.slot, at.parity);
    const uint32_t to = ring + at.slot * Shape::kSlotBytes;
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    const int sinks = sequence.sink_keys();
    // Past the tensor TMA writes zeros.
    if (!looks_past<Shape::kK>(keys, sinks, key_alignment(a.p.scores), j, a.p.shape.k_len) &&
        !sequence.has_unseen_keys(j, j + Shape::kK)) {
      load_shared(Type<ValueTile>{}, a.v, to, full + 8 * at.slot, j, head, item.batch);
    } else {
      load_shared(Type<ValueTile>{}, a.v, to, landed + 8 * at.slot, j, head, item.batch);
      mbarrier_wait(landed + 8 * at.slot, landed_parities >> at.slot & 1);
      landed_parities ^= 1u << at.slot;
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
    return clusters + int(increment_global(a.counter, a.order.items - 1));
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
  // Tells the warpgroups of the `round`-th item, whose queries may be loaded now; without one, that there is no more.
  const auto publish = [&](const ForwardItem& item, unsigned round) {
    if (lane_index() == 0) {
      store_item(item_address(smem, round), item);
      mbarrier_arrive(item_ready);
    }
    warp_barrier();
    if (item.first_row >= 0) load_query(item);
  };

  int number = cluster;
  Interval keys{};
  ForwardItem item{-1, 0, 0, 0, 0, 0, 0, 0};
  if (number < a.order.items) item = forward_item<Shape>(a, number, rank, keys);
  publish(item, 0);
#pragma unroll 1
  for (unsigned round = 0; item.first_row >= 0; ++round) {
    const ForwardItem now = item;
    const int kv_head = now.head / (a.p.shape.heads / a.p.shape.kv_heads);
    // A long item draws the next one late: one drawn early would wait while other blocks have nothing. A short one
    // draws at once, or the next queries would be late.
    const int draw_tile = now.key_tiles > 16 ? now.key_tiles - 8 : 0;
    const bool draws = a.order.drawn && rank == 0 && lane_index() == 0;
    int drawn = draws && draw_tile == 0 ? draw() : 0;
    int j = first_tile(now);
    load_keys(j, kv_head, now.batch);
    if (Shape::kCluster > 1 && draws && draw_tile == 0) send(drawn, round);

    const Interval now_keys = keys;
    const auto find_next = [&] {
      number = !a.order.drawn ? number + clusters : rank == 0 ? int(broadcast(drawn)) : receive(round);
      item.first_row = -1;
      if (number < a.order.items) item = forward_item<Shape>(a, number, rank, keys);
    };
    // Queries of the next item follow as soon as there is place for them: they come from far, and are needed at once.
    const uint32_t q_parity = round % 2;
    bool published = false;
#pragma unroll 1
    for (int t = 1; t < now.key_tiles; ++t) {
      if (draws && t == draw_tile) drawn = draw();
      const int last = j;
      j = next_tile<Shape>(now, j);
      load_keys(j, kv_head, now.batch);
      load_values(last, now_keys, kv_head, now);
      if (Shape::kCluster > 1 && draws && t == draw_tile) send(drawn, round);
      if (t < draw_tile || published || !broadcast(mbarrier_test(q_free, q_parity))) continue;
      find_next();
      publish(item, round + 1);
      published = true;
    }
    if (!published) find_next();
    load_values(j, now_keys, kv_head, now);
    if (published) continue;
    mbarrier_wait(q_free, q_parity);
    publish(item, round + 1);
  }
}

// The role of a warpgroup that computes.
template <class Element, class Shape, bool kGeneral>
__device__ __forceinline__ void compute_forward(const ForwardArguments& a, ForwardSmem<Shape>& smem) {
  constexpr int kScoreCols = Shape::kK / 4;
  constexpr int kSlot = Shape::kSlotBytes / 16;  // in a descriptor's units
  const int warpgroup = warp_index() / 4 - 1;
  const uint32_t q_full = shared_address(&smem.q_full), q_free = shared_address(&smem.q_free);
  const uint32_t full = shared_address(smem.full), free = shared_address(smem.free);
  const uint32_t q = descriptor(shared_address(smem.q.bytes) + warpgroup * kWarpgroupRows * kRowBytes);
  const uint32_t k = descriptor(shared_address(smem.ring));
  const uint32_t v = descriptor(shared_address(smem.ring), Tile<Shape::kK, Shape::kValueDim>::kChunkBytes);

  RingPosition<Shape::kSlots> at(0);
  unsigned taken = 0;   // items
  int j = 0, end = 0;   // first key of the current tile, and of the one after the last
  int sink_end = 0;     // where the tiles of the interval follow those of sinks
  Interval unmasked{};  // keys that all rows of this warp see
  uint32_t q_registers[Shape::kQueryInRegisters ? Shape::kHeadDim / 16 : 1][4];
  uint32_t p[Shape::kK / 16][4];  // probabilities, as operand A
  Fragment<2, Shape::kValueDim / 4> o;
  using Kept = uint32_t[Shape::kK / 16][2];  // of dropout
  ScoreWords<kScoreCols> ahead;              // of bias and mask
  std::conditional_t<Shape::kStagesScores, StagedReader<Element, Shape>, NothingStaged> staged(a, smem);
  LaggingSoftmax<2> softmax(ScoreRule<kGeneral>::factor_of(a.p.scores));
  o.clear();

  // Waits for the next item; false: there is none.
  const auto take_item = [&] {
    mbarrier_wait(shared_address(&smem.item_ready), taken % 2);
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken));
    if (item.first_row < 0) return false;
    j = broadcast(first_tile(item));
    end = broadcast(end_of_tiles<Shape>(item));
    if (Shape::kAnyVisibility) sink_end = broadcast(item.sink_end);
    return true;
  };
  const auto next_keys = [&] {
    j += Shape::kK;
    if (Shape::kAnyVisibility && j == sink_end)
      j = broadcast(load_item<ForwardItem>(item_address(smem, taken - 1)).first_key);
  };
  // What the softmax of the item that was taken last begins with.
  const auto begin_rows = [&] {
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
    const int row = item.first_row + (warp_index() - 4) * 16;
    unmasked = sequence_of<Shape>(a.p, item).keys_of_all_rows(row, row + 16);
    if (Shape::kReadsScores && row + 16 > item.q_len) unmasked = {0, 0};  // bias and mask have no rows there
    softmax.start_row_sums();
  };
  const auto take_query = [&] {
    mbarrier_wait(q_full, taken % 2);
    ++taken;
    if constexpr (Shape::kQueryInRegisters) {
      using QueryTile = Tile<Shape::kQ, Shape::kHeadDim>;
      const int row = (warp_index() - 4) * 16 + lane_index() % 16;
#pragma unroll
      for (int step = 0; step < Shape::kHeadDim / 16; ++step) {
        load_matrix_x4(q_registers[step],
                       shared_address(smem.q.bytes) + QueryTile::offset_bytes(row, 2 * step + lane_index() / 16));
      }
      settle_loads(q_registers);
      arrive_for_lane(q_free);
    }
  };
  // Queries that are not in registers are read until the last tile of keys is done.
  const auto release_query = [&] {
    if (!Shape::kQueryInRegisters && j + Shape::kK == end) arrive_for_lane(q_free);
  };
  const auto wait_full = [&] {
    mbarrier_wait(full + 8 * at.slot, at.parity);
    const int slot = at.slot;
    at.advance();
    return slot;
  };
  // wgmma reads for the whole warpgroup, and so does its wait. In a cluster a place is free when it is in both blocks.
  const auto release = [&](int slot) {
    if (thread_index() % kWarpgroupThreads != 0) return;
    if constexpr (Shape::kCluster > 1) {
      mbarrier_arrive_remote(free + 8 * slot, 0);
      mbarrier_arrive_remote(free + 8 * slot, 1);
    } else {
      mbarrier_arrive(free + 8 * slot);
    }
  };
  // Turns at issuing: barrier 1 + w is for warpgroup w, which waits, and the one before it, which arrives.
  const auto await_turn = [&] { named_barrier_sync(1 + warpgroup, 2 * kWarpgroupThreads); };
  const auto pass_turn = [&] {
    named_barrier_arrive(warpgroup + 1 == Shape::kWarpgroups ? 1 : warpgroup + 2, 2 * kWarpgroupThreads);
  };
  // What scores want from memory for the current tile of keys, of the item that was taken last.
  const auto load_ahead = [&] {
    staged.load_ahead();
    if constexpr (Shape::kReadsScores) {
      const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
      const ScoreRule<kGeneral> rule(a.p.scores, item.batch, item.head);
      rule.load_ahead(ahead, Position<>(item.first_row + (warp_index() - 4) * 16, j), sequence_of<Shape>(a.p, item),
                      false);
    }
  };
  // Scores of the current tile of keys to probabilities, and what is to be dropped of them as an operand. True: O is to
  // be multiplied by `correction`.
  const auto to_probabilities = [&](Fragment<2, kScoreCols>& s, Kept& kept, float (&correction)[2]) {
    s.settle_all();  // or the compiler looks at the scores before their product has been waited for, and serialises it
    if (ScoreRule<kGeneral>::needs_mask(unmasked, j, j + Shape::kK)) {
      const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
      const ScoreRule<kGeneral> rule(a.p.scores, item.batch, item.head);
      const Sequence sequence = sequence_of<Shape>(a.p, item);
      const int row = item.first_row + (warp_index() - 4) * 16;
      const bool whole = rule.is_whole(unmasked, j, j + Shape::kK);
      if constexpr (Shape::kReadsScores) {
        NoSlopes none;
        rule.apply(s, Position<>(row, j), sequence, whole, ahead, none);
      } else {
        rule.apply_staged(s, Position<>(row, j), sequence, whole, staged);
      }
      if (const int next = next_tile<Shape>(item, j); Shape::kReadsScores && next < end) {
        rule.load_ahead(ahead, Position<>(row, next), sequence, rule.is_whole(unmasked, next, next + Shape::kK));
      }
    }
    const bool moved = softmax.update(s, correction);
    if (drops<Shape>(a.p.scores)) {
      const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
      const DropoutBits bits(a.p, item.batch, item.head);
      const Position<> at(item.first_row + (warp_index() - 4) * 16, j);
      if constexpr (Shape::kDrops) bits.choose<kScoreCols>(kept, at);
      if constexpr (!Shape::kDrops) bits.drop(s, at);
    }
    return moved;
  };
  const auto take_probabilities = [&](const Fragment<2, kScoreCols>& s, const Kept& kept) {
    to_operand<Element>(p, s);
    if constexpr (Shape::kDrops) drop_packed(p, kept);
  };
  const auto store = [&](uint32_t item) {
    const float kept = kGeneral ? a.p.scores.dropout.kept : 1.0f;
    store_output<Element, Shape>(a, smem, load_item<ForwardItem>(item), softmax, o, kept);
  };
  if (warpgroup == Shape::kWarpgroups - 1) pass_turn();  // warpgroup 0 goes first
  bool more = take_item();
  if (more) {
    Fragment<2, kScoreCols> s;
    Kept kept;
    float correction[2];
    take_query();
    const int k_slot = wait_full();
    issue_scores<Element, Shape>(s, q, q_registers, k + k_slot * kSlot);
    load_ahead();
    wgmma_wait<0>();
    release(k_slot);
    release_query();
    begin_rows();
    to_probabilities(s, kept, correction);
    take_probabilities(s, kept);
  }
#pragma unroll 1
  while (more) {
    bool accumulate = false;
#pragma unroll 1
    for (next_keys(); j < end; next_keys()) {
      Fragment<2, kScoreCols> s;
      Kept kept;
      float correction[2];
      const int k_slot = wait_full();
      await_turn();
      issue_scores<Element, Shape>(s, q, q_registers, k + k_slot * kSlot);
      const int v_slot = wait_full();
      issue_output<Element, Shape>(o, p, v + v_slot * kSlot, accumulate);
      accumulate = true;
      pass_turn();
      staged.load_ahead();
      wgmma_wait<1>();
      release(k_slot);
      release_query();
      const bool moved = to_probabilities(s, kept, correction);
      wgmma_wait<0>();
      release(v_slot);
      take_probabilities(s, kept);
      if (moved) {
        o.scale_row(0, correction[0]);
        o.scale_row(1, correction[1]);
      }
    }

    const uint32_t done = item_address(smem, taken - 1);
    more = take_item();
    if (Shape::kQueryInRegisters && more) take_query();
    const int v_slot = wait_full();
    await_turn();
    if (!more) {
      issue_output<Element, Shape>(o, p, v + v_slot * kSlot, accumulate);
      pass_turn();
      wgmma_wait<0>();
      release(v_slot);
      store(done);
    } else {
      Fragment<2, kScoreCols> s;
      Kept kept;
      float correction[2];
      issue_output<Element, Shape>(o, p, v + v_slot * kSlot, accumulate);
      if constexpr (!Shape::kQueryInRegisters) take_query();
      const int k_slot = wait_full();
      issue_scores<Element, Shape>(s, q, q_registers, k + k_slot * kSlot);
      pass_turn();
      load_ahead();
      wgmma_wait<1>();
      release(v_slot);
      store(done);
      wgmma_wait<0>();
      release(k_slot);
      release_query();
      begin_rows();
      to_probabilities(s, kept, correction);
      take_probabilities(s, kept);
    }
  }
  if (Shape::kStoreByTma && elect_one()) tma_store_wait();
}

template <class Element, class Shape, bool kGeneral>
__global__ void __launch_bounds__(Shape::kThreads, 1) forward(const __grid_constant__ ForwardArguments a) {
  using Smem = ForwardSmem<Shape>;
  Smem& smem = shared_memory<Smem>();
  const bool stages = a.staged != StagedScores::kNothing;  // one warp more, which loads them, reads items
  if (thread_index() == 0) {
    mbarrier_init(shared_address(&smem.item_ready), 1);
    mbarrier_init(shared_address(&smem.q_full), 1);
    mbarrier_init(shared_address(&smem.q_free), Shape::kWarpgroups * kWarpgroupThreads + stages * kWarpThreads);
    if (stages) init_staged_places(smem);
    for (int slot = 0; slot < Shape::kSlots; ++slot) {
      mbarrier_init(shared_address(&smem.full[slot]), 1);
      mbarrier_init(shared_address(&smem.landed[slot]), 1);
      mbarrier_init(shared_address(&smem.free[slot]), Shape::kCluster * Shape::kWarpgroups);
    }
    for (int i = 0; i < kItems; ++i) mbarrier_init(shared_address(&smem.drawn_ready[i]), 1);
    mbarrier_init_fence();
  }
  if constexpr (Shape::kCluster > 1) {
    cluster_barrier();
  } else {
    barrier();
  }
  if (warp_index() < 4) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp_index() == 0) load_forward<Shape>(a, smem);
    if constexpr (Shape::kStagesScores) {
      if (stages && warp_index() == 1) load_staged<Shape>(a, smem);
    }
  } else {
    grow_registers<Shape::kComputeRegisters>();
    compute_forward<Element, Shape, kGeneral>(a, smem);
  }
  if constexpr (Shape::kCluster > 1) cluster_barrier();  // the other block may still write here
}

}  // namespace jfa::sm90

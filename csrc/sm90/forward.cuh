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
#include "sm90/forward_load.cuh"
#include "sm90/forward_products.cuh"
#include "sm90/forward_staged.cuh"
#include "sm90/forward_store.cuh"

namespace jfa::sm90 {

// The role of a warpgroup that computes.
template <class Element, class Shape, bool kGeneral>
__device__ __forceinline__ void compute_forward(const ForwardArguments& a, ForwardSmem<Shape>& smem) {
  using QueryTile = Tile<Shape::kQ, Shape::kHeadDim>;
  constexpr int kScoreCols = Shape::kK / 4;
  constexpr int kSlot = Shape::kSlotBytes / 16;  // in a descriptor's units
  const int warpgroup = warp_index() / 4 - 1;
  const uint32_t full = shared_address(smem.full), free = shared_address(smem.free);
  const uint32_t q_first = descriptor(shared_address(smem.q[0].bytes) + warpgroup * kWarpgroupRows * kRowBytes);
  uint32_t q = q_first;
  const uint32_t k = descriptor(shared_address(smem.ring));
  const uint32_t v = descriptor(shared_address(smem.ring), Tile<Shape::kK, Shape::kValueDim>::kChunkBytes);

  RingPosition<Shape::kSlots> at(0);
  unsigned taken = 0;  // items
  int j = 0, end = 0;  // first key of the current tile, and of the one after the last
  int sink_end = 0;    // where the tiles of the interval follow those of sinks
  // Of the item that was taken last, and this warp's rows of it: the first, keys that all see, what each sees, scores.
  // Plain scores need little of it, and where no registers are left, it is looked up again.
  constexpr bool kKeepsRows = Shape::kKeepsRows && (kGeneral || Shape::kAnyVisibility);
  int first_row = 0;
  Interval unmasked{};
  RowsKept<2> rows{};
  bool see_all = true;  // of what they see
  ScoreRule<kGeneral> rule(a.p.scores);
  uint2 seeds{};  // of dropout
  uint32_t q_registers[Shape::kQueryInRegisters ? Shape::kHeadDim / 16 : 1][4];
  uint32_t p[Shape::kK / 16][4];  // probabilities, as operand A
  Fragment<2, Shape::kValueDim / 4> o;
  using Kept = uint32_t[Shape::kK / 16][2];  // of dropout
  ScoreWords<kScoreCols> ahead;              // of bias and mask
  using Staged = StagedReader<Element, ForwardArguments, ForwardSmem<Shape>>;
  std::conditional_t<Shape::kStagesScores, Staged, NothingStaged> staged(a, smem);
  LaggingSoftmax<2> softmax(ScoreRule<kGeneral>::factor_of(a.p.scores));
  o.clear();

  // Waits for the next item; false: there is none.
  const auto take_item = [&] {
    const auto queries = QueryPlace<Shape>::of(taken);
    mbarrier_wait(shared_address(&smem.item_ready[queries.slot]), queries.parity);
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken));
    if (item.first_row < 0) return false;
    j = broadcast(first_tile(item));
    end = broadcast(end_of_tiles<Shape>(item));
    if (Shape::kAnyVisibility) sink_end = broadcast(item.sink_end);
    // What memory says of the rows is asked for here, and waited for when there are scores.
    first_row = item.first_row + (warp_index() - 4) * 16;
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    unmasked = sequence.keys_of_all_rows(first_row, first_row + 16);
    if constexpr (kKeepsRows) {
      const Position<> at(first_row, 0);
      rows = {{sequence.sight_of_row(at.row(0)), sequence.sight_of_row(at.row(1))}};
      see_all = sequence.all_see_all_keys(first_row);
      rule.begin(item.batch, item.head);
    }
    if constexpr (Shape::kDrops) seeds = DropoutBits::seeds_of(a.p, item.batch, item.head);
    return true;
  };
  const auto next_keys = [&] {
    j += Shape::kK;
    if (Shape::kAnyVisibility && j == sink_end)
      j = broadcast(load_item<ForwardItem>(item_address(smem, taken - 1)).first_key);
  };
  // What the softmax of the item that was taken last begins with.
  const auto begin_rows = [&] {
    if (Shape::kReadsScores && first_row + 16 > int(load_item<ForwardItem>(item_address(smem, taken - 1)).q_len))
      unmasked = {0, 0};  // bias and mask have no rows there
    softmax.start_row_sums();
  };
  // The first scores of an item are made of queries in shared memory. Those that are kept in registers come beside that
  // product.
  const auto take_query = [&] {
    const auto queries = QueryPlace<Shape>::of(taken);
    mbarrier_wait(shared_address(&smem.q_full[queries.slot]), queries.parity);
    q = q_first + broadcast(queries.slot * (QueryTile::kBytes / 16));
    ++taken;
  };
  const auto load_query = [&] {
    if constexpr (Shape::kQueryInRegisters) {
      const uint32_t place = shared_address(smem.q[QueryPlace<Shape>::of(taken - 1).slot].bytes);
      const int row = (warp_index() - 4) * 16 + lane_index() % 16;
#pragma unroll
      for (int step = 0; step < Shape::kHeadDim / 16; ++step) {
        load_matrix_x4(q_registers[step], place + QueryTile::offset_bytes(row, 2 * step + lane_index() / 16));
      }
    }
  };
  // After each product of scores: the place of queries that are not in registers is read until the last one is done.
  const auto release_query = [&](bool first) {
    if constexpr (Shape::kQueryInRegisters) {
      if (!first) return;
      settle_loads(q_registers);
    } else if (j + Shape::kK < end) {
      return;
    }
    arrive_for_lane(shared_address(&smem.q_free[QueryPlace<Shape>::of(taken - 1).slot]));
  };
  // What comes next in the ring: asked for early, since the answer takes 50 cycles even if it is yes.
  bool is_full = false;
  const auto ask_full = [&] { is_full = mbarrier_test(full + 8 * at.slot, at.parity); };
  const auto wait_full = [&] {
    if (!is_full) mbarrier_wait(full + 8 * at.slot, at.parity);
    is_full = false;
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
    const bool whole = rule.is_whole(unmasked, j, j + Shape::kK);
    const auto item = [&] { return load_item<ForwardItem>(item_address(smem, taken - 1)); };
    const Position<> at(first_row, j);
    NoSlopes none;
    if constexpr (kKeepsRows) {
      rule.apply_staged(s, at, rows, none, staged);
      if (!whole) {
        rule.hide_rows(s, at, sequence_of<Shape>(a.p, item()), rows, see_all);
        if constexpr (!kGeneral) s.settle_all();  // or every tile's scores are copied, beside the branch
      }
    } else if (rule.needs_mask(unmasked, j, j + Shape::kK)) {
      const ForwardItem now = item();
      rule.begin(now.batch, now.head);
      const Sequence sequence = sequence_of<Shape>(a.p, now);
      if constexpr (Shape::kReadsScores) {
        rule.apply(s, at, sequence, whole, ahead, none);
        if (const int next = next_tile<Shape>(now, j); next < end) {
          rule.load_ahead(ahead, Position<>(first_row, next), sequence,
                          rule.is_whole(unmasked, next, next + Shape::kK));
        }
      } else {
        const RowsLookedUp looked_up{sequence, at};
        rule.apply_staged(s, at, looked_up, none, staged);
        if (!whole) rule.hide_rows(s, at, sequence, looked_up);
      }
    }
    const bool moved = softmax.update(s, correction);
    if constexpr (Shape::kDrops) {
      DropoutBits(a.p, seeds).choose<kScoreCols>(kept, at);
    } else if (drops<Shape>(a.p.scores)) {
      const ForwardItem now = item();
      DropoutBits(a.p, now.batch, now.head).drop(s, at);
    }
    return moved;
  };
  const auto take_probabilities = [&](const Fragment<2, kScoreCols>& s, const Kept& kept) {
    to_operand<Element>(p, s);
    if constexpr (Shape::kDrops) drop_packed(p, kept);
  };
  const auto finish = [&](uint32_t item) {
    return finish_rows<Shape>(a.p, item, softmax, kGeneral ? a.p.scores.dropout.kept : 1.0f);
  };
  if (warpgroup == Shape::kWarpgroups - 1) pass_turn();  // warpgroup 0 goes first
  bool more = take_item();
  if (more) {
    Fragment<2, kScoreCols> s;
    Kept kept;
    float correction[2];
    take_query();
    const int k_slot = wait_full();
    issue_scores<Element, Shape, false>(s, q, q_registers, k + k_slot * kSlot);
    load_ahead();
    load_query();
    wgmma_wait<0>();
    release(k_slot);
    release_query(true);
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
      issue_scores<Element, Shape, Shape::kQueryInRegisters>(s, q, q_registers, k + k_slot * kSlot);
      const int v_slot = wait_full();
      issue_output<Element, Shape>(o, p, v + v_slot * kSlot, accumulate);
      accumulate = true;
      pass_turn();
      staged.load_ahead();
      wgmma_wait<1>();
      release(k_slot);
      release_query(false);
      const bool moved = to_probabilities(s, kept, correction);
      wgmma_wait<0>();
      release(v_slot);
      ask_full();
      take_probabilities(s, kept);
      if (moved) {
        o.scale_row(0, correction[0]);
        o.scale_row(1, correction[1]);
      }
    }

    const uint32_t done = item_address(smem, taken - 1);
    more = take_item();
    const int v_slot = wait_full();
    await_turn();
    if (!more) {
      issue_output<Element, Shape>(o, p, v + v_slot * kSlot, accumulate);
      pass_turn();
      const FinishedRows rows = finish(done);
      wgmma_wait<0>();
      release(v_slot);
      store_output<Element, Shape>(a, smem, done, rows, o);
    } else {
      Fragment<2, kScoreCols> s;
      Kept kept;
      float correction[2];
      issue_output<Element, Shape>(o, p, v + v_slot * kSlot, accumulate);
      const FinishedRows rows = finish(done);
      take_query();
      const int k_slot = wait_full();
      issue_scores<Element, Shape, false>(s, q, q_registers, k + k_slot * kSlot);
      pass_turn();
      load_ahead();
      wgmma_wait<1>();
      release(v_slot);
      load_query();
      store_output<Element, Shape>(a, smem, done, rows, o);
      wgmma_wait<0>();
      release(k_slot);
      release_query(true);
      begin_rows();
      to_probabilities(s, kept, correction);
      ask_full();
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
    for (int n = 0; n < Shape::kQueryPlaces; ++n) {
      mbarrier_init(shared_address(&smem.item_ready[n]), 1);
      mbarrier_init(shared_address(&smem.q_full[n]), 1);
      mbarrier_init(shared_address(&smem.q_free[n]), Shape::kWarpgroups * kWarpgroupThreads + stages * kWarpThreads);
    }
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

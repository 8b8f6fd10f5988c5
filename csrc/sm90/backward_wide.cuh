// dK and dV of the backward, Hopper family, for head dims whose dK and dV of 64 keys do not fit one warpgroup's
// registers together:  dV = P^T dO,  dK = scale dS^T Q  with  P = 2^(S factor - lse),  dS = P (dO V^T - delta).
//
// Persistent blocks. An item is a tile of 64 keys of one head: it passes over the query tiles that see the keys, for
// each query head of the group in turn. Two warps load, one Q (and K once an item), one dO (and V); a third loads a
// bias or a mask that TMA can copy. Two warpgroups compute, both transposed, so that the operands they make stay in
// registers:
//   the values'  S^T = K Q^T,    P^T from it, dV += P^T dO
//   the keys'    dP^T = V dO^T,  dS^T from it and from P^T, which the values' gives it through shared memory,
//                dK += dS^T Q
// Each issues the first product of step n + 1 before the accumulation of step n, and works on the elements of the
// former under the latter. Between two items the old one's epilogue runs under the first product of the new.
//
// In a cluster of two blocks, of neighbouring key tiles, both pass over the same query tiles: each loads half of every
// Q and dO into both, and a stage is free when both have read it.
#pragma once

#include "common/dropout.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm90/backward_wide_load.cuh"
#include "sm90/store_rows.cuh"

namespace jfa::sm90 {

// Writes a warp's 16 finished rows of dK or dV, times `factor`; those past k_len are zero, not what 0 x NaN made of
// them.
template <class Element, int kCols>
__device__ __forceinline__ void store_key_gradient(const BackwardWideItem& item, Fragment<2, kCols>& x, float factor,
                                                   const Tensor& to, int length, int dim) {
  const int row = item.first_key + thread_index() % kWarpgroupThreads / kWarpThreads * 16;
  if (row + 16 > item.k_len) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (Position<>(row, 0).row(r) < item.k_len) continue;
#pragma unroll
      for (int c = 0; c < kCols; ++c) x.v[r][c] = 0.0f;
    }
  }
  const float factors[2] = {factor, factor};
  store_rows<Element>(x, factors, to, item.batch, item.head, row, length, dim);
}

// CapSlopes of a thread, for want of registers where its probabilities will lie, in each four's 16 bytes.
struct SlopesInPlace {
  uint32_t place;

  __device__ __forceinline__ void keep(int r, int c, float tanh, float next) const {
    store_shared_32(address(r, c), pack<__half>(one_minus_square(tanh), one_minus_square(next)));
  }
  __device__ __forceinline__ float2 at(int r, int c) const { return unpack<__half>(load_shared_32(address(r, c))); }

 private:
  __device__ __forceinline__ uint32_t address(int r, int c) const {
    return place + (c / 4 * 2 + r) * kWarpgroupThreads * 16 + c % 4 * 2;
  }
};

// The role of a warpgroup that computes: of the values (S, P and dV) or of the keys (dP, dS and dK).
template <class Element, class Shape, bool kGeneral, bool kOfValues>
__device__ __forceinline__ void compute_key_gradient(const BackwardWideArguments& a, BackwardWideSmem<Shape>& smem) {
  using First = BackwardWideStream<Shape, kOfValues>;    // of the first product
  using Second = BackwardWideStream<Shape, !kOfValues>;  // of the accumulation
  constexpr int kFirstUnits = First::Streamed::kBytes / 16, kSecondUnits = Second::Streamed::kBytes / 16;
  constexpr int kOutCols = Second::kDim / 4;
  constexpr int kSteps = First::kDim / 16, kHeld = Shape::kHeldSteps < kSteps ? Shape::kHeldSteps : kSteps;
  const First first(smem);
  const Second second(smem);
  const uint32_t resident = descriptor(first.resident);
  const uint32_t streamed = descriptor(first.streamed);
  const uint32_t columns = descriptor(second.streamed, Second::Streamed::kChunkBytes);
  const uint32_t item_full = shared_address(smem.item_full), item_free = shared_address(smem.item_free);
  const uint32_t p_full = shared_address(smem.p_full), p_free = shared_address(smem.p_free);
  const int group = a.p.shape.heads / a.p.shape.kv_heads;
  const bool one_thread = thread_index() % kWarpgroupThreads == 0;
  const int other = Shape::kCluster > 1 ? cluster_rank() ^ 1 : 0;

  RingPosition<First::kStages> first_at(0);
  RingPosition<Second::kStages> second_at(0);
  RingPosition<Shape::kPlaces> p_at(kOfValues ? 1 : 0);
  RingPosition<kBackwardWideItems> item_at(0);
  uint32_t resident_parity = 0;
  int steps = 0, row = 0, tile = 0, head = 0;  // of the current item; the last three of the current step
  Interval unmasked{};                         // rows that see all keys
  Fragment<2, kOutCols> out;
  uint32_t operand[Shape::kQ / 16][4];      // P^T or dS^T
  uint32_t held[kHeld > 0 ? kHeld : 1][4];  // of what stays, as operand A
  out.clear();

  const auto item_address = [&](int slot) { return shared_address(smem.items) + slot * kBackwardWideItemWords * 4; };
  // Waits for the next item; false: there is none.
  const auto take_item = [&] {
    mbarrier_wait(item_full + 8 * item_at.slot, item_at.parity);
    const BackwardWideItem item = load_item<BackwardWideItem>(item_address(item_at.slot));
    if (item.first_key < 0) return false;
    steps = broadcast(item.tiles * group);
    return true;
  };
  // Registers are short where scores are staged; uniform ones are left.
  const auto uniform = [](int x) { return Shape::kStagesScores ? int(broadcast(x)) : x; };
  // What the elements of the item that was taken last begin with.
  const auto begin_item = [&] {
    if constexpr (!kOfValues) return;
    const BackwardWideItem item = load_item<BackwardWideItem>(item_address(item_at.slot));
    unmasked = sequence_of<Shape>(a.p, item).rows_of_all_keys(item.first_key, item.first_key + Shape::kKeys);
    unmasked = {uniform(unmasked.begin), uniform(unmasked.end)};
    row = uniform(first_tile_row(a, item));
    head = uniform(item.head) * group;
    tile = 0;
  };
  const auto next_row = [&] {
    if constexpr (!kOfValues) return;
    row += Shape::kQ;
    if (++tile * group < steps) return;
    const BackwardWideItem item = load_item<BackwardWideItem>(item_address(item_at.slot));
    row = uniform(first_tile_row(a, item));
    tile = 0;
    ++head;
  };
  const auto take_resident = [&] {
    mbarrier_wait(first.resident_full, resident_parity);
    resident_parity ^= 1;
    const int row = warp_index() % 4 * 16 + lane_index() % 16;
#pragma unroll
    for (int step = 0; step < kHeld; ++step) {
      load_matrix_x4(held[step], first.resident + First::Resident::offset_bytes(row, 2 * step + lane_index() / 16));
    }
    if constexpr (kHeld > 0) settle_loads(held);
    if constexpr (kHeld == kSteps) arrive_for_warp(first.resident_free);
  };
  // In a cluster: the other block, which loads into this one too, may load once the products here have read a stage.
  // Statistics each block loads for itself.
  const auto tell_other = [&](uint32_t free) {
    if (Shape::kCluster > 1 && one_thread) mbarrier_arrive_remote(free, other);
  };
  // wgmma reads for the whole warpgroup, and so does its wait.
  const auto release_resident = [&] {
    if constexpr (kHeld < kSteps) arrive_for_warp(first.resident_free);
  };
  const auto release_second = [&] {
    if (one_thread) mbarrier_arrive(second.free + 8 * second_at.slot);
    tell_other(second.free + 8 * second_at.slot);
    second_at.advance();
  };

  const auto issue_first = [&](Fragment<2, Shape::kQ / 4>& s) {
    if constexpr (kGeneral) s.clear();  // as in backward.cuh: a branch changes it
    mbarrier_wait(first.full + 8 * first_at.slot, first_at.parity);
    // Or the descriptor of each step would be kept, in two registers.
    const uint32_t resident_now = Shape::kStagesScores ? broadcast(opaque(resident)) : resident;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < First::kDim / 16; ++step) {
      const int within = step % 4 * 32;
      const uint64_t rows =
          descriptor_at(streamed + first_at.slot * kFirstUnits, step / 4 * First::Streamed::kChunkBytes + within);
      if (step < kHeld) {
        Wgmma<Shape::kQ>::template rs<Element, false>(s.v, held[step], rows, step != 0);
      } else {
        const uint64_t keys = descriptor_at(resident_now, step / 4 * First::Resident::kChunkBytes + within);
        Wgmma<Shape::kQ>::template ss<Element, false, false>(s.v, keys, rows, step != 0);
      }
    }
    wgmma_commit();
  };
  const auto issue_second = [&](bool accumulate) {
    mbarrier_wait(second.full + 8 * second_at.slot, second_at.parity);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Shape::kQ / 16; ++step) {
      Wgmma<Second::kDim>::template rs<Element, true>(
          out.v, operand[step], descriptor_at(columns + second_at.slot * kSecondUnits, step * 16 * kRowBytes),
          step != 0 || accumulate);
    }
    wgmma_commit();
  };

  // A thread gives its elements to the thread of the same place in the other warpgroup, which needs the same ones.
  const auto p_address = [&] {
    return shared_address(smem.p) +
           (p_at.slot * Shape::kQ / 8 * kWarpgroupThreads + thread_index() % kWarpgroupThreads) * 16;
  };
  // What they become on the way: of a soft cap, times its derivative.
  using Slopes = std::conditional_t<Shape::kStagesScores, SlopesInPlace, CapSlopes<2, Shape::kQ / 4>>;
  const auto give = [&](const Fragment<2, Shape::kQ / 4>& p, const Slopes& slopes) {
    if constexpr (!Shape::kStagesScores) mbarrier_wait(p_free + 8 * p_at.slot, p_at.parity);
    const uint32_t to = p_address();
#pragma unroll
    for (int n = 0; n < Shape::kQ / 8; ++n) {
      const float (&x)[Shape::kQ / 4] = p.v[n % 2];
      const int c = n / 2 * 4;
      float4 given{x[c], x[c + 1], x[c + 2], x[c + 3]};
      if (kGeneral && a.p.scores.soft_cap != 0.0f) {
        const float2 first = slopes.at(n % 2, c), second = slopes.at(n % 2, c + 2);
        given = {given.x * first.x, given.y * first.y, given.z * second.x, given.w * second.y};
      }
      store_shared_f32x4(to + n * kWarpgroupThreads * 16, given);
    }
    arrive_for_lane(p_full + 8 * p_at.slot);
    p_at.advance();
  };
  const auto take = [&](Fragment<2, Shape::kQ / 4>& p) {
    mbarrier_wait(p_full + 8 * p_at.slot, p_at.parity);
    const uint32_t from = p_address();
#pragma unroll
    for (int n = 0; n < Shape::kQ / 8; ++n) {
      const float4 x = load_shared_f32x4(from + n * kWarpgroupThreads * 16);
      const int c = n / 2 * 4;
      p.v[n % 2][c] = x.x;
      p.v[n % 2][c + 1] = x.y;
      p.v[n % 2][c + 2] = x.z;
      p.v[n % 2][c + 3] = x.w;
    }
  };
  // What is staged for the current step. Call it while the first product runs.
  const auto read_staged = [&] {
    if constexpr (Shape::kStagesScores && kOfValues) {
      return TransposedStagedReader<Element, BackwardWideSmem<Shape>, true>(
          a, shared_address(smem.scores[first_at.slot].bytes));
    } else {
      return NothingStaged();
    }
  };
  // The finished first product becomes P^T or dS^T, and its stage is given back.
  const auto work_on_elements = [&](Fragment<2, Shape::kQ / 4>& s, auto& staged) {
    s.settle_all();  // or the compiler looks at the elements before their product has been waited for
    const uint32_t statistics = first.statistics + (first_at.slot * Shape::kQ + lane_index() % 4 * 2) * 4;
    if constexpr (kOfValues) {
      Slopes slopes;  // of general scores
      if constexpr (Shape::kStagesScores) {
        mbarrier_wait(p_free + 8 * p_at.slot, p_at.parity);
        slopes.place = p_address();
      }
      const bool hides = ScoreRule<kGeneral>::template may_hide<Shape::kReadsScores>(unmasked, row, row + Shape::kQ);
      if (kGeneral || hides) {
        const BackwardWideItem item = load_item<BackwardWideItem>(item_address(item_at.slot));
        const ScoreRule<kGeneral> rule(a.p.scores, item.batch, head);
        const Position<> at(item.first_key + warp_index() % 4 * 16, row);
        if constexpr (Shape::kStagesScores) {
          rule.apply_staged_transposed(s, at, sequence_of<Shape>(a.p, item), hides, slopes, staged);
          staged.settle();
        } else {
          rule.template apply_transposed<Shape::kReadsScores>(s, at, sequence_of<Shape>(a.p, item), hides, slopes);
        }
      }
      const float factor = ScoreRule<kGeneral>::factor_of(a.p.scores);
      if (hides) {
        probabilities_of_columns<true>(s, factor, statistics);
      } else {
        probabilities_of_columns<false>(s, factor, statistics);
      }
      if (drops<Shape>(a.p.scores)) {
        const BackwardWideItem item = load_item<BackwardWideItem>(item_address(item_at.slot));
        DropoutBits(a.p, item.batch, head)
            .template mark<true>(s, Position<>(item.first_key + warp_index() % 4 * 16, row));
      }
      next_row();
      give(s, slopes);
      if (drops<Shape>(a.p.scores)) clear_marked(s);
    } else {
      Fragment<2, Shape::kQ / 4> p;
      take(p);
      if (drops<Shape>(a.p.scores)) drop_gradients(s, p, a.p.scores.dropout.kept);
      gradients_of_columns<true, Shape::kMayDrop>(p, s, statistics);
      arrive_for_lane(p_free + 8 * p_at.slot);
      p_at.advance();
    }
    arrive_for_lane(first.free + 8 * first_at.slot);
    tell_other(first.free + 8 * first_at.slot);
    first_at.advance();
  };
  const auto store = [&](int slot) {
    const BackwardWideItem item = load_item<BackwardWideItem>(item_address(slot));
    const jfa::Shape& shape = a.p.shape;
    if constexpr (kOfValues) {
      const float kept = kGeneral ? a.p.scores.dropout.kept : 1.0f;
      store_key_gradient<Element>(item, out, kept, a.g.dv, item.stop, shape.value_dim);
    } else {
      const float scale = ScoreRule<kGeneral>(a.p.scores, item.batch, 0).scale;
      store_key_gradient<Element>(item, out, scale, a.g.dk, item.stop, shape.head_dim);
    }
    arrive_for_lane(item_free + 8 * slot);
  };

  bool more = take_item();
  if (more) {
    Fragment<2, Shape::kQ / 4> s;
    take_resident();
    issue_first(s);
    begin_item();
    auto staged = read_staged();
    wgmma_wait<0>();
    if (steps == 1) release_resident();
    work_on_elements(s, staged);
    to_operand<Element>(operand, s);
  }
#pragma unroll 1
  while (more) {
    bool accumulate = false;
#pragma unroll 1
    for (int n = 1; n < steps; ++n) {
      Fragment<2, Shape::kQ / 4> s;
      issue_first(s);
      issue_second(accumulate);
      accumulate = true;
      auto staged = read_staged();
      wgmma_wait<1>();
      if (n + 1 == steps) release_resident();
      work_on_elements(s, staged);
      wgmma_wait<0>();
      release_second();
      to_operand<Element>(operand, s);
    }

    const int done = item_at.slot;
    item_at.advance();
    more = take_item();
    if (!more) {
      issue_second(accumulate);
      wgmma_wait<0>();
      release_second();
      store(done);
    } else {
      Fragment<2, Shape::kQ / 4> s;
      issue_second(accumulate);
      take_resident();
      issue_first(s);
      begin_item();
      wgmma_wait<1>();
      release_second();
      store(done);
      auto staged = read_staged();
      wgmma_wait<0>();
      if (steps == 1) release_resident();
      work_on_elements(s, staged);
      to_operand<Element>(operand, s);
    }
  }
}

template <class Element, class Shape, bool kGeneral>
__global__ void __launch_bounds__(Shape::kThreads, 1) backward_wide(const __grid_constant__ BackwardWideArguments a) {
  using Smem = BackwardWideSmem<Shape>;
  Smem& smem = shared_memory<Smem>();
  if (thread_index() == 0) {
    for (int n = 0; n < kBackwardWideItems; ++n) {
      mbarrier_init(shared_address(&smem.item_full[n]), 1);
      // Each lane that computes, or of the warps that load but the first; in the first block of a cluster also the
      // other's warp of queries.
      const bool draws_for_other = Shape::kCluster > 1 && cluster_rank() == 0;
      mbarrier_init(shared_address(&smem.item_free[n]), (9 + Shape::kStagesScores) * kWarpThreads + draws_for_other);
      mbarrier_init(shared_address(&smem.drawn_ready[n]), 1);
    }
    mbarrier_init(shared_address(&smem.k_full), 1);
    mbarrier_init(shared_address(&smem.v_full), 1);
    mbarrier_init(shared_address(&smem.k_free), 4);
    mbarrier_init(shared_address(&smem.v_free), 4);
    // The rows and their statistics, and what is staged.
    constexpr int kWhoFills = 1 + kWarpThreads;
    // Each lane that reads the statistics, and the warpgroup that accumulates; of the other block the warpgroups.
    constexpr int kWhoFrees = kWarpgroupThreads + (Shape::kCluster > 1 ? 3 : 1);
    for (int stage = 0; stage < Shape::kQueryStages; ++stage) {
      mbarrier_init(shared_address(&smem.q_full[stage]), kWhoFills + Shape::kStagesScores);
      mbarrier_init(shared_address(&smem.q_landed[stage]), 1);
      mbarrier_init(shared_address(&smem.q_free[stage]), kWhoFrees);
    }
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      mbarrier_init(shared_address(&smem.d_o_full[stage]), kWhoFills);
      mbarrier_init(shared_address(&smem.d_o_landed[stage]), 1);
      mbarrier_init(shared_address(&smem.d_o_free[stage]), kWhoFrees);
    }
    for (int place = 0; place < Shape::kPlaces; ++place) {
      mbarrier_init(shared_address(&smem.p_full[place]), kWarpgroupThreads);
      mbarrier_init(shared_address(&smem.p_free[place]), kWarpgroupThreads);
    }
    mbarrier_init_fence();
  }
  if constexpr (Shape::kCluster > 1) {
    cluster_barrier();
  } else {
    barrier();
  }
  const int warp = warp_index();
  if (warp < 4) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp == 0) load_stream<Shape, true>(a, smem);
    if (warp == 1) load_stream<Shape, false>(a, smem);
    if constexpr (Shape::kStagesScores) {
      if (warp == 2) load_staged<Shape>(a, smem);
    }
  } else {
    grow_registers<Shape::kComputeRegisters>();
    if (warp < 8) {
      compute_key_gradient<Element, Shape, kGeneral, true>(a, smem);
    } else {
      compute_key_gradient<Element, Shape, kGeneral, false>(a, smem);
    }
  }
  if constexpr (Shape::kCluster > 1) cluster_barrier();  // the other block may still write here
}

}  // namespace jfa::sm90

// dQ of head dims above 128, Hopper family:  dQ = scale sum over key tiles of dS K, in their order,
//   dS = P (dO V^T - delta),   P = exp(S - lse) recomputed.
//
// Persistent blocks, built like the forward: warp 0 loads by TMA, and numbers the work; warp 1 loads a bias or a mask
// that TMA can copy, as forward_staged.cuh has it; the warpgroups that compute own 64 query rows each, and take turns
// at issuing. In its turn a warpgroup issues dQ += dS(t-1) K(t-1), S(t) = Q K' and dP(t) = dO V'; it computes dS(t)
// under the products of the others. Where values have one place, dP(t) has a turn of its own: both warpgroups read the
// values one after the other, and the next have twice as long to come. Between two items nothing changes but Q and dO:
// the old dQ is stored under the new item's first scores.
#pragma once

#include "common/dropout.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm90/backward_query_load.cuh"
#include "sm90/forward_store.cuh"

namespace jfa::sm90 {

// D = A B' of one warpgroup, A [64, kDim] and B [kRows, kDim]: the products are issued, not waited for.
template <class Element, int kDim, int kRows>
__device__ __forceinline__ void issue_product(Fragment<2, kRows / 4>& d, uint32_t a, uint32_t b) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int chunk = step / 4, column_bytes = step % 4 * 32;
    Wgmma<kRows>::template ss<Element, false, false>(
        d.v, descriptor_at(a, chunk * kWarpgroupRows * kRowBytes + column_bytes),
        descriptor_at(b, chunk * kRows * kRowBytes + column_bytes), step != 0);
  }
  wgmma_commit();
}

// dQ += dS K
template <class Element, class Shape>
__device__ __forceinline__ void issue_query_gradient(Fragment<2, Shape::kHeadDim / 4>& dq, const uint32_t (*ds)[4],
                                                     uint32_t k, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kK / 16; ++step) {
    Wgmma<Shape::kHeadDim>::template rs<Element, true>(dq.v, ds[step], descriptor_at(k, step * 16 * kRowBytes),
                                                       step != 0 || accumulate);
  }
  wgmma_commit();
}

// Writes one warp's 16 finished rows, those past q_len as zeros. A quad of lanes holds 32 columns of a row in pieces of
// 2; it turns them into pieces of 8, 16 bytes a lane.
template <class Element, int kCols>
__device__ __forceinline__ void store_query_gradient(const BackwardQueryArguments& a, const ForwardItem& item,
                                                     float scale, const Fragment<2, kCols>& dq) {
  const int warp = opaque(thread_index()) / kWarpThreads - 4;  // among those that compute; a register less in the loop
  const Position<> at(item.first_row + warp * 16, 0);
  const int quad = lane_index() % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = opaque(at.row(r));
    uint16_t* row = head_of(a.g.dq, item.batch, item.head) + i * a.g.dq.row_stride;
#pragma unroll
    for (int block = 0; block < kCols / 8; ++block) {
      uint32_t x[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int c = 8 * block + 2 * n;
        const uint32_t pair = pack<Element>(dq.v[r][c] * scale, dq.v[r][c + 1] * scale);
        x[n] = i < item.q_len ? pair : 0;
      }
      transpose_quad(x, quad);
      const int col = 32 * block + 8 * quad;
      if (i < item.stop && col < a.p.shape.head_dim) {
        store_global_128(row + col, uint4{x[0], x[1], x[2], x[3]});
      }
    }
  }
}

// The role of a warpgroup that computes.
template <class Element, class Shape, bool kGeneral>
__device__ __forceinline__ void compute_backward_query(const BackwardQueryArguments& a,
                                                       BackwardQuerySmem<Shape>& smem) {
  using Smem = BackwardQuerySmem<Shape>;
  constexpr int kScoreCols = Shape::kK / 4;
  // Of shared memory, in a descriptor's units.
  constexpr int kKeysPlace = Smem::Keys::kBytes / 16;
  constexpr int kValuesPlace = Smem::Values::kBytes / 16;
  const int warpgroup = warp_index() / 4 - 1;
  const uint32_t q = descriptor(shared_address(smem.rows[warpgroup].q.bytes));
  const uint32_t d_o = descriptor(shared_address(smem.rows[warpgroup].d_o.bytes));
  const uint32_t k = descriptor(shared_address(smem.k), Smem::Keys::kChunkBytes);
  const uint32_t v = descriptor(shared_address(smem.v));
  const uint32_t k_full = shared_address(smem.k_full), k_free = shared_address(smem.k_free);
  const uint32_t v_full = shared_address(smem.v_full), v_free = shared_address(smem.v_free);

  uint32_t rows_parity = 0;
  RingPosition<Shape::kKeyPlaces> k_at(0);
  RingPosition<Shape::kValuePlaces> v_at(0);
  unsigned taken = 0;              // items
  int j = 0, end = 0;              // first key of the current tile, and of the one after the last
  int sink_end = 0;                // where the tiles of the interval follow those of sinks
  Interval unmasked{};             // keys that all rows of this warp see
  float lse[2], delta[2];          // of this thread's rows, lse in log2 units
  int k_slot = -1;                 // the place of the keys that dS is of; none yet
  bool accumulate = false;         // whether dQ has a term of its item already
  uint32_t ds[Shape::kK / 16][4];  // as operand A
  Fragment<2, Shape::kHeadDim / 4> dq;
  using Staged = StagedReader<Element, BackwardQueryArguments, Smem>;
  std::conditional_t<Shape::kStagesScores, Staged, NothingStaged> staged(a, smem);
  dq.clear();

  // Waits for the next item; false: there is none.
  const auto take_item = [&] {
    mbarrier_wait(shared_address(&smem.item_ready[taken % kItems]), taken / kItems % 2);
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken++));
    if (item.first_row < 0) return false;
    j = broadcast(first_tile(item));
    end = broadcast(end_of_tiles<Shape>(item));
    sink_end = broadcast(item.sink_end);
    return true;
  };
  const auto begin_rows = [&] {
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
    const int row = item.first_row + (warp_index() - 4) * 16;
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    unmasked = sequence.keys_of_all_rows(row, row + 16);
    load_row_statistics(a.p, a.g, sequence, item.batch, item.head, Position<>(row, 0), lse, delta);
  };
  // wgmma reads for the whole warpgroup, and so does its wait.
  const auto release = [&](uint32_t mbarrier) {
    if (thread_index() % kWarpgroupThreads == 0) mbarrier_arrive(mbarrier);
  };
  // Turns at issuing, as in the forward: barrier 1 + w is for warpgroup w.
  const auto await_turn = [&] { named_barrier_sync(1 + warpgroup, 2 * kWarpgroupThreads); };
  const auto pass_turn = [&] { named_barrier_arrive(2 - warpgroup, 2 * kWarpgroupThreads); };
  const auto apply_rule = [&](Fragment<2, kScoreCols>& s, bool hides, CapSlopes<2, kScoreCols>& slopes) {
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
    const ScoreRule<kGeneral> rule(a.p.scores, item.batch, item.head);
    const Position<> at(item.first_row + (warp_index() - 4) * 16, j);
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    if constexpr (Shape::kStagesScores) {
      const RowsLookedUp rows{sequence, at};
      rule.apply_staged(s, at, rows, slopes, staged);
      if (hides) rule.hide_rows(s, at, sequence, rows);
    } else {
      rule.template apply<Shape::kReadsScores>(s, at, sequence, hides, slopes);
    }
  };
  const auto store = [&](unsigned number) {
    const ForwardItem item = load_item<ForwardItem>(item_address(smem, number));
    store_query_gradient<Element>(a, item, ScoreRule<kGeneral>(a.p.scores, item.batch, item.head).scale, dq);
  };
  const float factor = ScoreRule<kGeneral>::factor_of(a.p.scores);
  const bool dropping = drops<Shape>(a.p.scores);

  if (warpgroup == Shape::kWarpgroups - 1) pass_turn();  // warpgroup 0 goes first
  bool more = take_item();
  if (!more) return;  // of packed sequences there may be fewer tiles than the host thought
  bool first = true;  // tile of its item
#pragma unroll 1
  while (more) {
    Fragment<2, kScoreCols> s, dp;
    CapSlopes<2, kScoreCols> slopes;  // of general scores
    // What a branch changes has to begin as something, or the compiler lets it begin as the last one ended, and copies
    // that between the products.
    if constexpr (kGeneral) dp.clear();
    const int last_k_slot = k_slot;
    k_slot = k_at.slot;
    mbarrier_wait(k_full + 8 * k_slot, k_at.parity);
    k_at.advance();

    await_turn();
    if (last_k_slot >= 0) {
      issue_query_gradient<Element, Shape>(dq, ds, k + last_k_slot * kKeysPlace, accumulate);
    }
    if (first) mbarrier_wait(shared_address(&smem.rows_full[warpgroup]), rows_parity);
    issue_product<Element, Shape::kHeadDim, Shape::kK>(s, q, k + k_slot * kKeysPlace);
    const auto issue_dp = [&] {
      issue_product<Element, Shape::kValueDim, Shape::kK>(dp, d_o, v + v_at.slot * kValuesPlace);
    };
    if constexpr (!Shape::kTwoTurns) {
      mbarrier_wait(v_full + 8 * v_at.slot, v_at.parity);
      issue_dp();
    }
    pass_turn();
    if (first) begin_rows();
    staged.load_ahead();

    wgmma_wait<Shape::kTwoTurns ? 1 : 2>();
    if (last_k_slot >= 0) release(k_free + 8 * last_k_slot);
    if (first && taken > 1) store(taken - 2);

    wgmma_wait<Shape::kTwoTurns ? 0 : 1>();
    if constexpr (kGeneral) s.settle_all();  // or the compiler looks at the scores before they have been waited for
    const bool hides = ScoreRule<kGeneral>::template may_hide<Shape::kReadsScores>(unmasked, j, j + Shape::kK);
    if (kGeneral || hides) apply_rule(s, hides, slopes);
    if (hides) {
      probabilities_of_rows<true>(s, factor, lse);
    } else {
      probabilities_of_rows<false>(s, factor, lse);
    }
    if (dropping) {
      const ForwardItem item = load_item<ForwardItem>(item_address(smem, taken - 1));
      const int row = item.first_row + (warp_index() - 4) * 16;
      DropoutBits(a.p, item.batch, item.head).template mark<false>(s, Position<>(row, j));
    }

    if constexpr (Shape::kTwoTurns) {
      mbarrier_wait(v_full + 8 * v_at.slot, v_at.parity);
      await_turn();
      issue_dp();
      pass_turn();
    }
    wgmma_wait<0>();
    if constexpr (kGeneral) dp.settle_all();  // as the scores above
    release(v_free + 8 * v_at.slot);
    v_at.advance();
    accumulate = !first;
    j += Shape::kK;
    first = j == end;
    if (j == sink_end) j = broadcast(load_item<ForwardItem>(item_address(smem, taken - 1)).first_key);
    if (first) {
      arrive_for_warp(shared_address(&smem.rows_free[warpgroup]));
      rows_parity ^= 1;
    }
    if (dropping) drop_gradients(dp, s, a.p.scores.dropout.kept);
    if (hides) {
      gradients_of_rows<true, Shape::kMayDrop>(s, dp, delta);
    } else {
      gradients_of_rows<false, Shape::kMayDrop>(s, dp, delta);
    }
    if (kGeneral && a.p.scores.soft_cap != 0.0f) slopes.multiply_into(dp);
    to_operand<Element>(ds, dp);
    if (first) more = take_item();
  }
  await_turn();
  issue_query_gradient<Element, Shape>(dq, ds, k + k_slot * kKeysPlace, accumulate);
  pass_turn();
  wgmma_wait<0>();
  store(taken - 2);
}

template <class Element, class Shape, bool kGeneral>
__global__ void __launch_bounds__(Shape::kThreads, 1) backward_query(const __grid_constant__ BackwardQueryArguments a) {
  using Smem = BackwardQuerySmem<Shape>;
  Smem& smem = shared_memory<Smem>();
  if (thread_index() == 0) {
    for (int i = 0; i < kItems; ++i) mbarrier_init(shared_address(&smem.item_ready[i]), 1);
    for (int w = 0; w < Shape::kWarpgroups; ++w) {
      mbarrier_init(shared_address(&smem.rows_full[w]), 1);
      mbarrier_init(shared_address(&smem.rows_free[w]), 4);  // warps, which also have read the item
    }
    for (int place = 0; place < Shape::kKeyPlaces; ++place) {
      mbarrier_init(shared_address(&smem.k_full[place]), 1);
      mbarrier_init(shared_address(&smem.k_free[place]), Shape::kWarpgroups);
    }
    for (int place = 0; place < Shape::kValuePlaces; ++place) {
      mbarrier_init(shared_address(&smem.v_full[place]), 1);
      mbarrier_init(shared_address(&smem.v_free[place]), Shape::kWarpgroups);
    }
    if constexpr (Shape::kStagesScores) init_staged_places(smem);
    mbarrier_init(shared_address(&smem.landed), 1);
    mbarrier_init_fence();
  }
  barrier();
  if (warp_index() < 4) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp_index() == 0) load_backward_query<Shape>(a, smem);
    if constexpr (Shape::kStagesScores) {
      if (warp_index() == 1) load_staged<Shape>(a, smem);
    }
  } else {
    grow_registers<Shape::kComputeRegisters>();
    compute_backward_query<Element, Shape, kGeneral>(a, smem);
  }
}

}  // namespace jfa::sm90

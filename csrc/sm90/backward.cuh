// Backward, Hopper family, for head dims whose dK and dV fit into registers beside the scores:
//   dV = P^T dO,   dS = P (dO V^T - delta),   dK = scale dS^T Q,   dQ = scale dS K
//
// Persistent blocks; an item is a key tile of one key/value head, with the query tiles that see its keys, for each
// query head of the group in turn. Warp 0 loads: K and V of an item, then Q and dO through a ring. Warp 1 reads the
// rows' statistics, warp 2 loads a bias or a mask that TMA can copy. The warpgroups that compute own 64 keys each. They
// compute S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T come out of the accumulators as operands from registers.
// dS also goes through shared memory, transposed, and one query tile later, when all warpgroups have written theirs,
// they make of it together the tile's part of dQ, which is added to an accumulator in device memory, in the order of
// the registers: see backward_tiles.h. store_dq() then only scales, rounds and puts rows in order. In deterministic
// mode warp 3 has key tiles wait for each other with their additions. Where it pays, warpgroups take turns at issuing
// products, so that one's exponentials run under the other's products.
#pragma once

#include "common/dropout.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm90/backward_load.cuh"
#include "sm90/backward_products.cuh"
#include "sm90/backward_staged.cuh"
#include "sm90/store_rows.cuh"

namespace jfa::sm90 {

// Writes a warp's 16 finished rows of dK and dV; those past k_len are zero, not what 0 x NaN made of them.
template <class Element, class Shape, bool kGeneral>
__device__ __forceinline__ void store_key_gradients(const BackwardArguments& a, const BackwardItem& item,
                                                    Fragment<2, Shape::kHeadDim / 4>& dk,
                                                    Fragment<2, Shape::kHeadDim / 4>& dv) {
  const Problem& p = a.p;
  const int row = item.first_key + (thread_index() / kWarpThreads - 4) * 16;
  const float scale = ScoreRule<kGeneral>(p.scores, item.batch, 0).scale;
  const float kept = kGeneral ? p.scores.dropout.kept : 1.0f;
  const float scales[2] = {scale, scale}, factors[2] = {kept, kept};
  if (row + 16 > item.k_len) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (Position<>(row, 0).row(r) < item.k_len) continue;
#pragma unroll
      for (int c = 0; c < Shape::kHeadDim / 4; ++c) dk.v[r][c] = dv.v[r][c] = 0.0f;
    }
  }
  store_rows<Element>(dv, factors, a.g.dv, item.batch, item.kv_head, row, item.stop, p.shape.value_dim);
  store_rows<Element>(dk, scales, a.g.dk, item.batch, item.kv_head, row, item.stop, p.shape.head_dim);
}

// The role of a warpgroup that computes.
template <class Element, class Shape, bool kGeneral>
__device__ __forceinline__ void compute_backward(const BackwardArguments& a, BackwardSmem<Shape>& smem) {
  using KeyTile = decltype(smem.k);
  using QueryTile = Tile<Shape::kQ, Shape::kHeadDim>;
  using ScoreTile = Tile<Shape::kQ, Shape::kK>;
  using Rule = ScoreRule<kGeneral>;
  using Layout = QueryGradientLayout<Shape>;
  // With registers to spare, P and dS are one block of instructions, and the address of dQ is kept from tile to tile
  // (d 128: 1 and 2 %, d 96: 6 to 7 % together).
  constexpr bool kRoomy = Shape::kWarpgroups == 2 && !kGeneral && !Shape::kMayDrop;
  // Whether a warpgroup leaves out query tiles that see none of its keys, as the first ones of causal key tiles (d 128,
  // causal 4k: 506 against 494; d 96 loses 4 % by the branch, even where all is seen, d 64 gains nothing).
  constexpr bool kSkips = kRoomy && !Shape::kAnyVisibility && Shape::kHeadDim == 128;
  const int warpgroup = warp_index() / 4 - 1;
  const int warp = warp_index() - 4;
  // All descriptors are made of two. Where each has its own, the compiler runs out of uniform registers, and keeps some
  // in those of each lane.
  using Smem = BackwardSmem<Shape>;
  constexpr uint32_t kOwnRows = kWarpgroupRows * kRowBytes / 16, kQueryPlace = QueryTile::kBytes / 16;
  constexpr uint32_t kScorePlace = ScoreTile::kBytes / 16;
  const uint32_t base = descriptor(shared_address(smem.k.bytes));
  const uint32_t k_rows = broadcast(base + warpgroup * kOwnRows);
  const uint32_t v_rows = k_rows + (offsetof(Smem, v) - offsetof(Smem, k)) / 16;
  // What of K makes this warpgroup's share of dQ: all columns, or a chunk of 64.
  const int k_chunk = Shape::kShare == QueryShare::kColumns ? warpgroup : 0;
  const uint32_t k_columns = with_chunk_stride(base + k_chunk * (KeyTile::kChunkBytes / 16), KeyTile::kChunkBytes);
  const uint32_t q = with_chunk_stride(base + (offsetof(Smem, q) - offsetof(Smem, k)) / 16, QueryTile::kChunkBytes);
  const uint32_t d_o = q + (offsetof(Smem, d_o) - offsetof(Smem, q)) / 16;
  const uint32_t ds = base + (offsetof(Smem, ds) - offsetof(Smem, k)) / 16 +
                      (Shape::kShare == QueryShare::kRows ? warpgroup * kOwnRows : 0);
  // A lane's row of the four matrices it stores of dS for 16 queries: two along the keys, two along the queries.
  const uint32_t ds_place =
      shared_address(smem.ds[0].bytes) +
      ScoreTile::offset_bytes(lane_index() / 16 * 8 + lane_index() % 8, 2 * warp + lane_index() / 8 % 2);
  const float factor_log2 = Rule::factor_of(a.p.scores);
  const bool dropping = drops<Shape>(a.p.scores);
  const int group = a.p.shape.heads / a.p.shape.kv_heads;
  const int band = Shape::kShare == QueryShare::kTurns ? warp % 4 : warp;
  const bool ordered = a.g.deterministic;
  constexpr bool kTurns = Shape::kShare == QueryShare::kTurns;
  const int step = row_step<Shape>(a.g);

  const auto await_turn = [&] {
    if (Shape::kTakesTurns) named_barrier_sync(1 + warpgroup, 2 * kWarpgroupThreads);
  };
  const auto pass_turn = [&] {
    if (Shape::kTakesTurns) named_barrier_arrive(2 - warpgroup, 2 * kWarpgroupThreads);
  };
  if (warpgroup == Shape::kWarpgroups - 1) pass_turn();  // warpgroup 0 goes first

  RingPosition<Shape::kStages> at(0);
  ScorePlace ds_at;
  int whose = Shape::kWarpgroups - 1;  // of kTurns: who makes dQ of the tile before; of the first tile, the first
  uint32_t turn_parity = 0;            // of the next turn at adding to dQ in deterministic mode
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    const BackwardItem item = wait_for_item(smem, taken);
    if (item.first_key < 0) break;
    const int from_row = broadcast(item.from_row);
    const int to_row = from_row + (broadcast(item.q_tiles) - 1) * step;
    const int first_key = broadcast(item.first_key) + warp * 16;
    // Queries that see all keys of this warp, and where tiles begin that see some of its warpgroup's.
    const Sequence sequence = sequence_of<Shape>(a.p, item);
    const Interval unmasked = sequence.rows_of_all_keys(first_key, first_key + 16);
    const int own_key = first_key - warp % 4 * 16;
    const Interval seen = sequence.rows_of_keys(own_key, own_key + kWarpgroupRows);
    const int first_seen = seen.begin - Shape::kQ + 1;
    const unsigned rows_seen = max(seen.end - first_seen, 0);
    Fragment<2, Shape::kHeadDim / 4> dk, dv;
    dk.clear();
    dv.clear();
    mbarrier_wait(shared_address(&smem.kv_full), taken % 2);

    HeldKeys<Shape::kHeldK> held_k;
    HeldKeys<Shape::kHeldV> held_v;
    if (item.q_tiles > 0) {  // else no product would wait for them, and their place would be given back too early
      hold_keys<Shape::kHeldK>(held_k, smem.k, warp * 16);
      hold_keys<Shape::kHeldV>(held_v, smem.v, warp * 16);
    }

    int h = broadcast(item.kv_head) * group;
    int heads_left = item.q_tiles > 0 ? group : 0;
    int i = from_row;
    const auto dq_of = [&](int head, int row) {
      const int batch = load_shared_32(shared_address(&smem.items[taken % kBackwardItems].batch));
      return dq_tile<Shape>(a.p, a.g, batch, head, row) + piece_offset<Layout>(band, 0) +
             lane_index() * Layout::kLaneFloats;
    };
    // The tile before, whose part of dQ is made under this one.
    bool is_first = true;  // there is none
    int head_before = 0, row_before = 0;
    float* dq_before = nullptr;
    // Until all have written dS of that tile. Then the next place is free as well: it held the tile three before, and
    // whoever makes dQ of that had done so before writing.
    const auto await_ds = [&] { mbarrier_wait(shared_address(&smem.ds_full), ds_at.parity); };
    const auto makes_dq = [&] { return !is_first && (Shape::kShare != QueryShare::kTurns || whose == warpgroup); };
    const auto issue_dq = [&](QueryGradient<Shape>& dq) {
      issue_query_gradient<Element, Shape>(dq, ds + ds_at.before() * kScorePlace, k_columns);
    };
    const auto add_dq = [&](QueryGradient<Shape>& dq) {
      dq.settle_all();
      if (band >= Layout::kBands) return;  // past the head dim
      // Where there is no order, the phase before the first, which has ended: a branch costs registers.
      mbarrier_wait(shared_address(&smem.dq_turn[kTurns ? warpgroup : 0]),
                    ordered ? (kTurns ? turn_parity : ds_at.parity) : 1);
      turn_parity ^= 1;
      add_query_gradient<Shape>(kRoomy ? dq_before : dq_of(head_before, row_before), dq);
      if (ordered) arrive_for_warp(shared_address(&smem.dq_added));
    };
    const auto make_dq = [&] {
      if (!makes_dq()) return;
      QueryGradient<Shape> dq;
      issue_dq(dq);
      wgmma_wait<0>();
      add_dq(dq);
    };
    const auto store_ds = [&](int queries_16, const uint32_t (&x)[4]) {
      store_matrix_x4_transposed(ds_place + ds_at.slot * ScoreTile::kBytes + queries_16 * 16 * kRowBytes, x);
    };
    const auto finish_step = [&] {
      if (kRoomy) dq_before = i == from_row ? dq_of(h, i) : dq_before + step * Shape::kHeadDim;
      head_before = h;
      row_before = i;
      if (++whose == Shape::kWarpgroups) whose = 0;
      is_first = false;
      wgmma_wait<0>();
      arrive_for_lane(shared_address(&smem.stage_free[at.slot]));  // its statistics were read by every lane
      at.advance();
      ds_at.advance();
      if (i == to_row) {
        i = from_row - step;
        ++h;
        --heads_left;
      }
      i += step;
    };
    // A step of a query tile that sees none of the warpgroup's keys: dS is zero, dQ of the tile before is made.
    const auto skip_step = [&] {
      mbarrier_wait(shared_address(&smem.q_full[at.slot]), at.parity);
      mbarrier_wait(shared_address(&smem.d_o_full[at.slot]), at.parity);
      await_turn();
      pass_turn();
      await_ds();
#pragma unroll
      for (int n = 0; n < Shape::kQ / 16; ++n) store_ds(n, {});
      fence_async_shared();
      arrive_for_lane(shared_address(&smem.ds_full));
      await_turn();
      pass_turn();
      make_dq();
      finish_step();
    };
#pragma unroll 1
    while (heads_left > 0) {
      const int slot = at.slot;
      if (kSkips && unsigned(i - first_seen) >= rows_seen) {
        skip_step();
        continue;
      }
      const uint32_t statistics = shared_address(&smem.rows[slot]) + lane_index() % 4 * 8;
      Fragment<2, Shape::kQ / 4> s, dp;
      std::conditional_t<Shape::kCaps, CapSlopes<2, Shape::kQ / 4>, NoSlopes> slopes;
      // What a branch changes has to begin as something, or the compiler lets it begin as the last one ended, and
      // copies that between the products.
      if constexpr (kGeneral) dp.clear();
      uint32_t p_operand[Shape::kQ / 16][4], ds_operand[Shape::kQ / 16][4];

      mbarrier_wait(shared_address(&smem.q_full[slot]), at.parity);
      await_turn();
      issue_scores_transposed<Element, Shape, Shape::kHeldK>(s, k_rows, held_k, q + slot * kQueryPlace);
      mbarrier_wait(shared_address(&smem.d_o_full[slot]), at.parity);
      issue_scores_transposed<Element, Shape, Shape::kHeldV>(dp, v_rows, held_v, d_o + slot * kQueryPlace);
      pass_turn();

      auto staged = [&] {
        if constexpr (Shape::kStagesScores) {
          mbarrier_wait(shared_address(&smem.staged_full[slot]), at.parity);
          return TransposedStagedReader<Element, BackwardSmem<Shape>>(a,
                                                                      shared_address(smem.staged.scores[slot].bytes));
        } else {
          return NothingStaged();
        }
      }();
      wgmma_wait<1>();
      s.settle_all();  // or the compiler looks at the scores before their product has been waited for
      const bool hides = Rule::template may_hide<Shape::kReadsScores>(unmasked, i, i + Shape::kQ);
      const float factor =
          kGeneral ? Rule::factor_of(a.p.scores) : factor_log2;  // without a register for the whole time
      const uint32_t delta = statistics + Shape::kQ * 4;
      const auto round = [&] {
        to_operand<Element>(p_operand, s);
        to_operand<Element>(ds_operand, dp);
#pragma unroll
        for (int n = 0; n < Shape::kQ / 16; ++n) store_ds(n, ds_operand[n]);
      };
      const auto with_rule = [&](const auto& use) {
        const BackwardItem now = load_item<BackwardItem>(shared_address(&smem.items[taken % kBackwardItems]));
        use(Rule(a.p.scores, now.batch, h), Position<>(first_key, i), sequence_of<Shape>(a.p, now));
      };
      if constexpr (kRoomy) {
        exponents_of_columns(s, factor, statistics);  // before masks: scale may be 0, and 0 x -inf is NaN
        if (hides) {
          with_rule(
              [&](const auto& rule, const auto& at, const auto& sequence) { rule.hide_transposed(s, at, sequence); });
        }
        await_ds();
        wgmma_wait<0>();
        dp.settle_all();
        if (hides) {
          softmax_gradient_of_columns<true>(s, dp, delta);
          round();
        } else {
          softmax_gradient_of_columns<false>(s, dp, delta);
          round();
        }
      } else {
        if (kGeneral || hides) {
          with_rule([&](const auto& rule, const auto& at, const auto& sequence) {
            if constexpr (Shape::kStagesScores) {
              rule.apply_staged_transposed(s, at, sequence, hides, slopes, staged);
            } else {
              rule.template apply_transposed<Shape::kReadsScores>(s, at, sequence, hides, slopes);
            }
          });
        }
        if (hides) {
          probabilities_of_columns<true>(s, factor, statistics);
        } else {
          probabilities_of_columns<false>(s, factor, statistics);
        }
        if (dropping) {
          const int batch = load_shared_32(shared_address(&smem.items[taken % kBackwardItems].batch));
          DropoutBits(a.p, batch, h).template mark<true>(s, Position<>(first_key, i));
        }
        await_ds();
        wgmma_wait<0>();
        dp.settle_all();
        if (dropping) drop_gradients(dp, s, a.p.scores.dropout.kept);
        if (hides) {
          gradients_of_columns<true, Shape::kMayDrop>(s, dp, delta);
        } else {
          gradients_of_columns<false, Shape::kMayDrop>(s, dp, delta);
        }
        if (dropping) clear_marked(s);
        if (kGeneral && Shape::kCaps && a.p.scores.soft_cap != 0.0f) slopes.multiply_into(dp);
        round();
      }
      fence_async_shared();
      arrive_for_lane(shared_address(&smem.ds_full));
      await_turn();
      issue_key_gradient<Element, Shape>(dv, p_operand, d_o + slot * kQueryPlace);
      if (makes_dq()) {
        QueryGradient<Shape> dq;
        issue_dq(dq);
        issue_key_gradient<Element, Shape>(dk, ds_operand, q + slot * kQueryPlace);
        pass_turn();
        wgmma_wait<1>();
        add_dq(dq);
      } else {
        issue_key_gradient<Element, Shape>(dk, ds_operand, q + slot * kQueryPlace);
        pass_turn();
      }
      finish_step();
    }
    if (!is_first) {
      await_ds();
      make_dq();
    }
    arrive_for_lane(shared_address(&smem.kv_free));
    dk.settle_all();
    dv.settle_all();
    store_key_gradients<Element, Shape, kGeneral>(
        a, load_item<BackwardItem>(shared_address(&smem.items[taken % kBackwardItems])), dk, dv);
  }
}

template <class Element, class Shape, bool kGeneral>
__global__ void __launch_bounds__(Shape::kThreads, 1) backward(const __grid_constant__ BackwardArguments a) {
  auto& smem = shared_memory<BackwardSmem<Shape>>();
  if (thread_index() == 0) {
    for (int n = 0; n < kBackwardItems; ++n) mbarrier_init(shared_address(&smem.item_ready[n]), 1);
    mbarrier_init(shared_address(&smem.kv_full), 2 + kWarpThreads);  // K, V, and who may have written zeros there
    // Each thread that computes, and the warps that read statistics and load a bias or a mask.
    mbarrier_init(shared_address(&smem.kv_free),
                  Shape::kWarpgroups * kWarpgroupThreads + 1 + Shape::kStagesScores + a.g.deterministic);
    mbarrier_init(shared_address(&smem.landed), 1);
    mbarrier_init(shared_address(&smem.ds_full), Shape::kWarpgroups * kWarpgroupThreads);
    for (uint64_t& turn : smem.dq_turn) mbarrier_init(shared_address(&turn), 1);
    mbarrier_init(shared_address(&smem.dq_added), QueryGradientLayout<Shape>::kBands);
    for (int n = 0; n < Shape::kStages; ++n) {
      mbarrier_init(shared_address(&smem.q_full[n]), 1 + kWarpThreads);  // Q and the statistics
      mbarrier_init(shared_address(&smem.stage_free[n]), Shape::kWarpgroups * kWarpgroupThreads);
      mbarrier_init(shared_address(&smem.d_o_full[n]), 1);
      if constexpr (Shape::kStagesScores) mbarrier_init(shared_address(&smem.staged_full[n]), 1);
    }
    mbarrier_init_fence();
  }
  barrier();
  if (warp_index() < 4) {
    shrink_registers<Shape::kLoadRegisters>();
    if (warp_index() == 0) load_backward<Shape>(a, smem);
    if (warp_index() == 1) load_statistics<Shape>(a, smem);
    if constexpr (Shape::kStagesScores) {
      if (warp_index() == 2) load_staged<Shape>(a, smem);
    }
    if (warp_index() == 3 && a.g.deterministic) order_additions<Shape>(a, smem);
  } else {
    grow_registers<Shape::kComputeRegisters>();
    compute_backward<Element, Shape, kGeneral>(a, smem);
  }
}

}  // namespace jfa::sm90

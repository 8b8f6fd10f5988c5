// Backward, Hopper family, for head dims whose dK and dV fit into registers beside the scores:
//   dV = P^T dO,   dS = P (dO V^T - delta),   dK = scale dS^T Q,   dQ = scale dS K
//
// Persistent blocks; an item is a key tile of one key/value head, with the query tiles that see its keys, for each
// query head of the group in turn. Warp 0 loads: K and V of an item, then Q and dO through a ring. Warp 1 reads the
// rows' statistics, warp 2 loads a bias or a mask that TMA can copy. The warpgroups that compute own 64 keys each. They
// compute S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T come out of the accumulators as operands from registers.
// dS also goes through shared memory, transposed, and all warpgroups together make of it the tile's part of dQ, which
// is added to an accumulator in device memory, in the order of the registers: see backward_tiles.h. store_dq() then
// only scales, rounds and puts rows in order. In deterministic mode there is no dQ here.
#pragma once

#include "common/dropout.cuh"
#include "common/scores.cuh"
#include "common/softmax.cuh"
#include "sm90/backward_products.cuh"
#include "sm90/backward_staged.cuh"
#include "sm90/backward_work.cuh"
#include "sm90/store_rows.cuh"

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

  int number = block_index();
#pragma unroll 1
  for (unsigned published = 0;; ++published) {
    Interval rows{};
    BackwardItem item{-1, 0, 0, 0, 0, 0, 0};
    if (number < a.order.items) item = backward_item<Shape>(a, number, rows);
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
    if (early) load_q(item.kv_head * group, item.first_row);
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
#pragma unroll 1
    for (int h = item.kv_head * group; h < (item.kv_head + 1) * group; ++h) {
#pragma unroll 1
      for (int i = item.first_row; i < rows.end; i += Shape::kQ) {
        if (!early) load_q(h, i);
        early = false;
        load_d_o(h, i);
        at.advance();
      }
    }
    // Drawn late, with the loads of two steps under way: one drawn early would wait while other blocks have nothing.
    int drawn = 0;
    if (lane_index() == 0) drawn = grid_blocks() + int(increment_global(a.g.counters, a.order.items - 1));
    number = int(broadcast(drawn));
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
          const int i = item.first_row + tile * Shape::kQ + n * kWarpThreads + lane_index();
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
  store_rows<Element>(dv, factors, a.g.dv, item.batch, item.kv_head, row, p.shape.k_len, p.shape.value_dim);
  store_rows<Element>(dk, scales, a.g.dk, item.batch, item.kv_head, row, p.shape.k_len, p.shape.head_dim);
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
  constexpr int kQueryPlace = QueryTile::kBytes / 16, kScorePlace = ScoreTile::kBytes / 16;  // in a descriptor's units
  const int warpgroup = warp_index() / 4 - 1;
  const int warp = warp_index() - 4;
  const uint32_t own_rows = warpgroup * kWarpgroupRows * kRowBytes;
  const uint32_t k_rows = descriptor(shared_address(smem.k.bytes) + own_rows);
  const uint32_t v_rows = descriptor(shared_address(smem.v.bytes) + own_rows);
  // What of K makes this warpgroup's share of dQ: all columns, or a chunk of 64.
  const int k_chunk = Shape::kShare == QueryShare::kColumns ? warpgroup : 0;
  const uint32_t k_columns =
      descriptor(shared_address(smem.k.bytes) + k_chunk * KeyTile::kChunkBytes, KeyTile::kChunkBytes);
  const uint32_t q = descriptor(shared_address(smem.q[0].bytes), QueryTile::kChunkBytes);
  const uint32_t d_o = descriptor(shared_address(smem.d_o[0].bytes), QueryTile::kChunkBytes);
  const uint32_t ds =
      descriptor(shared_address(smem.ds[0].bytes) + (Shape::kShare == QueryShare::kRows ? own_rows : 0));
  // A lane's row of the four matrices it stores of dS for 16 queries: two along the keys, two along the queries.
  const uint32_t ds_place =
      shared_address(smem.ds[0].bytes) +
      ScoreTile::offset_bytes(lane_index() / 16 * 8 + lane_index() % 8, 2 * warp + lane_index() / 8 % 2);
  const float factor_log2 = Rule::factor_of(a.p.scores);
  const bool dropping = drops<Shape>(a.p.scores);
  const int group = a.p.shape.heads / a.p.shape.kv_heads;
  const int band = Shape::kShare == QueryShare::kTurns ? warp % 4 : warp;
  const bool adds = !a.g.deterministic;  // to dQ

  RingPosition<Shape::kStages> at(0);
  int turn = 0;  // of kTurns: whose it is
#pragma unroll 1
  for (unsigned taken = 0;; ++taken) {
    const BackwardItem item = wait_for_item(smem, taken);
    if (item.first_key < 0) break;
    const int first_row = broadcast(item.first_row);
    const int end = first_row + broadcast(item.q_tiles) * Shape::kQ;
    const int first_key = broadcast(item.first_key) + warp * 16;
    // Queries that see all keys of this warp.
    const Interval unmasked = sequence_of<Shape>(a.p, item).rows_of_all_keys(first_key, first_key + 16);
    Fragment<2, Shape::kHeadDim / 4> dk, dv;
    dk.clear();
    dv.clear();
    mbarrier_wait(shared_address(&smem.kv_full), taken % 2);

    int h = broadcast(item.kv_head) * group;
    int heads_left = item.q_tiles > 0 ? group : 0;
    int i = first_row;
    const auto dq_of = [&](int head, int row) {
      const int batch = load_shared_32(shared_address(&smem.items[taken % kBackwardItems].batch));
      return dq_tile<Shape>(a.p, a.g, batch, head, row) + piece_offset<Layout>(band, 0) +
             lane_index() * Layout::kLaneFloats;
    };
    float* dq_to = dq_of(h, first_row);  // follows i and h
#pragma unroll 1
    while (heads_left > 0) {
      const int slot = at.slot;
      const uint32_t statistics = shared_address(&smem.rows[slot]) + lane_index() % 4 * 8;
      Fragment<2, Shape::kQ / 4> s, dp;
      std::conditional_t<Shape::kCaps, CapSlopes<2, Shape::kQ / 4>, NoSlopes> slopes;
      // What a branch changes has to begin as something, or the compiler lets it begin as the last one ended, and
      // copies that between the products.
      if constexpr (kGeneral) dp.clear();
      uint32_t p_operand[Shape::kQ / 16][4], ds_operand[Shape::kQ / 16][4];

      mbarrier_wait(shared_address(&smem.q_full[slot]), at.parity);
      issue_scores_transposed<Element, Shape>(s, k_rows, q + slot * kQueryPlace);
      mbarrier_wait(shared_address(&smem.d_o_full[slot]), at.parity);
      issue_scores_transposed<Element, Shape>(dp, v_rows, d_o + slot * kQueryPlace);

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
        for (int step = 0; step < Shape::kQ / 16; ++step) {
          store_matrix_x4_transposed(ds_place + slot * ScoreTile::kBytes + step * 16 * kRowBytes, ds_operand[step]);
        }
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
      issue_key_gradient<Element, Shape>(dv, p_operand, d_o + slot * kQueryPlace);

      const bool mine = adds && (Shape::kShare != QueryShare::kTurns || turn == warpgroup);
      if (mine) {
        QueryGradient<Shape> dq;
        named_barrier_sync(1 + slot, Shape::kWarpgroups * kWarpgroupThreads);  // dS is complete
        issue_query_gradient<Element, Shape>(dq, ds + slot * kScorePlace, k_columns);
        issue_key_gradient<Element, Shape>(dk, ds_operand, q + slot * kQueryPlace);
        wgmma_wait<1>();
        dq.settle_all();
        if (band < Layout::kBands) {  // else past the head dim
          add_query_gradient<Shape>(kRoomy ? dq_to : dq_of(h, i), dq);
        }
      } else {
        if (adds) named_barrier_arrive(1 + slot, Shape::kWarpgroups * kWarpgroupThreads);
        issue_key_gradient<Element, Shape>(dk, ds_operand, q + slot * kQueryPlace);
      }
      wgmma_wait<0>();
      arrive_for_lane(shared_address(&smem.stage_free[slot]));  // its statistics were read by every lane
      at.advance();
      if (Shape::kShare == QueryShare::kTurns && ++turn == Shape::kWarpgroups) turn = 0;
      i += Shape::kQ;
      dq_to += Layout::kTileFloats;
      if (i == end) {
        i = first_row;
        ++h;
        --heads_left;
        dq_to = dq_of(h, first_row);
      }
    }
    arrive_for_warp(shared_address(&smem.kv_free));
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
    mbarrier_init(shared_address(&smem.kv_full), 2);  // K and V
    // Each warp that computes, and those that read statistics and load a bias or a mask.
    mbarrier_init(shared_address(&smem.kv_free), Shape::kWarpgroups * 4 + 1 + Shape::kStagesScores);
    mbarrier_init(shared_address(&smem.landed), 1);
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
  } else {
    grow_registers<Shape::kComputeRegisters>();
    compute_backward<Element, Shape, kGeneral>(a, smem);
  }
}

}  // namespace jfa::sm90

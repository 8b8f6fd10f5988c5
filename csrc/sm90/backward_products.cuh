// The products of the Hopper backward that owns keys, and what becomes of dQ. Products are issued, not waited for.
#pragma once

#include "common/fragment.cuh"
#include "sm90/backward_work.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/shared_matrix.cuh"

namespace jfa::sm90 {

// As much of a warpgroup's 64 keys as registers hold, 16 columns a step: shared memory gives K and V no faster than the
// products of scores take them.
template <int kSteps>
using HeldKeys = uint32_t[kSteps > 0 ? kSteps : 1][4];
template <int kSteps, class KeyTile>
__device__ __forceinline__ void hold_keys(HeldKeys<kSteps>& held, const KeyTile& keys, int first_row) {
  const int row = opaque(first_row + lane_index() % 16);  // or a part of it is kept from item to item, and spilled
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    load_matrix_x4(held[step], shared_address(keys.bytes) + KeyTile::offset_bytes(row, 2 * step + lane_index() / 16));
  }
}

// S^T = K Q^T, and dP^T = V dO^T: one warpgroup's 64 keys, kHeld steps of which are held.
template <class Element, class Shape, int kHeld>
__device__ __forceinline__ void issue_scores_transposed(Fragment<2, Shape::kQ / 4>& s, uint32_t keys,
                                                        const HeldKeys<kHeld>& held, uint32_t queries) {
  constexpr int kKeyChunk = Tile<Shape::kK, Shape::kHeadDim>::kChunkBytes;
  constexpr int kQueryChunk = Tile<Shape::kQ, Shape::kHeadDim>::kChunkBytes;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kHeadDim / 16; ++step) {
    const uint64_t columns = descriptor_at(queries, step / 4 * kQueryChunk + step % 4 * 32);
    if (step < kHeld) {
      Wgmma<Shape::kQ>::template rs<Element, false>(s.v, held[step], columns, step != 0);
    } else {
      Wgmma<Shape::kQ>::template ss<Element, false, false>(
          s.v, descriptor_at(keys, step / 4 * kKeyChunk + step % 4 * 32), columns, step != 0);
    }
  }
  wgmma_commit();
}

// dV += P^T dO, and dK += dS^T Q
template <class Element, class Shape>
__device__ __forceinline__ void issue_key_gradient(Fragment<2, Shape::kHeadDim / 4>& d,
                                                   const uint32_t (&x)[Shape::kQ / 16][4], uint32_t queries) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kQ / 16; ++step) {
    Wgmma<Shape::kHeadDim>::template rs<Element, true>(d.v, x[step], descriptor_at(queries, step * 16 * kRowBytes),
                                                       true);
  }
  wgmma_commit();
}

// Where dS of a tile goes, while dQ of the tile before is made of the place before.
struct ScorePlace {
  int slot = 0;
  uint32_t parity = 1;  // of the phase that ended when all had written dS of the tile before

  __device__ __forceinline__ int before() const { return slot == 0 ? kDsPlaces - 1 : slot - 1; }
  __device__ __forceinline__ void advance() {
    parity ^= 1;
    if (++slot == kDsPlaces) slot = 0;
  }
};

// One warpgroup's share of dQ = dS K, or of its transposed.
template <class Shape>
using QueryGradient = Fragment<2, (Shape::kShare == QueryShare::kRows ? Shape::kHeadDim : Shape::kQ) / 4>;

template <class Element, class Shape>
__device__ __forceinline__ void issue_query_gradient(QueryGradient<Shape>& dq, uint32_t ds, uint32_t keys) {
  constexpr int kChunk = Tile<Shape::kQ, Shape::kK>::kChunkBytes;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kK / 16; ++step) {
    const uint64_t scores = descriptor_at(ds, step / 4 * kChunk + step % 4 * 32);
    const uint64_t columns = descriptor_at(keys, step * 16 * kRowBytes);
    if constexpr (Shape::kShare == QueryShare::kRows) {
      Wgmma<Shape::kHeadDim>::template ss<Element, false, true>(dq.v, scores, columns, step != 0);
    } else {
      Wgmma<Shape::kQ>::template ss<Element, true, false>(dq.v, columns, scores, step != 0);
    }
  }
  wgmma_commit();
}

// Adds a warp's band to the accumulator.
template <class Shape>
__device__ __forceinline__ void add_query_gradient(float* to, const QueryGradient<Shape>& dq) {
  using Layout = QueryGradientLayout<Shape>;
#pragma unroll
  for (int n = 0; n < Layout::kPieces; ++n) {
    add_global_x4(to + piece_offset<Layout>(0, n),
                  float4{dq.v[0][2 * n], dq.v[0][2 * n + 1], dq.v[1][2 * n], dq.v[1][2 * n + 1]});
  }
}

}  // namespace jfa::sm90

// The two products of the Hopper forward.
#pragma once

#include "common/fragment.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/shared_matrix.cuh"

namespace jfa::sm90 {

// S = Q K^T of one warpgroup and one tile of keys: the products are issued, not waited for. The queries are taken from
// registers or from shared memory.
template <class Element, class Shape, bool kQueryInRegisters>
__device__ __forceinline__ void issue_scores(Fragment<2, Shape::kK / 4>& s, uint32_t q,
                                             const uint32_t (*q_registers)[4], uint32_t k) {
  using QueryTile = Tile<Shape::kQ, Shape::kHeadDim>;
  using KeyTile = Tile<Shape::kK, Shape::kHeadDim>;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kHeadDim / 16; ++step) {
    const uint64_t keys = descriptor_at(k, step / 4 * KeyTile::kChunkBytes + step % 4 * 32);
    if constexpr (kQueryInRegisters) {
      Wgmma<Shape::kK>::template rs<Element, false>(s.v, q_registers[step], keys, step != 0);
    } else {
      const uint64_t queries = descriptor_at(q, step / 4 * QueryTile::kChunkBytes + step % 4 * 32);
      Wgmma<Shape::kK>::template ss<Element, false, false>(s.v, queries, keys, step != 0);
    }
  }
  wgmma_commit();
}

// O += P V
template <class Element, class Shape>
__device__ __forceinline__ void issue_output(Fragment<2, Shape::kValueDim / 4>& o, const uint32_t (*p)[4], uint32_t v,
                                             bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::kK / 16; ++step) {
    Wgmma<Shape::kValueDim>::template rs<Element, true>(o.v, p[step], descriptor_at(v, step * 16 * kRowBytes),
                                                        step != 0 || accumulate);
  }
  wgmma_commit();
}

}  // namespace jfa::sm90

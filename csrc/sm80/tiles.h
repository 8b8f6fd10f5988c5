// The shapes the portable family's kernels are compiled in, by head dim. Every tile fits the 99 KB of shared memory
// that the smallest of its GPUs (sm_86, sm_89, sm_120) give a block.
#pragma once

#include <cstdint>

#include "problem.h"

namespace jfa::sm80 {

constexpr int kSharedMemoryLimit = 99 * 1024;

// The kernels for general scores are also those for more than a formula of who sees whom: in the others it would cost
// registers of all.
inline bool runs_general(const Problem& p) { return is_general(p.scores) || !is_formula(p.visibility); }

// A warp owns q_tile / warps query rows; with 32 of them each key it reads from shared memory serves two products.
template <int kHeadDim>
struct ForwardTile {
  static constexpr int kQ = kHeadDim <= 192 ? 128 : 64;
  static constexpr int kK = 64;
  static constexpr int kWarps = kHeadDim == 192 ? 8 : 4;  // 32 x 192 outputs would not fit a warp's registers
  static constexpr int kBlocksPerSm = kHeadDim == 192 ? 1 : 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRowsPerWarp = kQ / kWarps;
  static constexpr int kSharedBytes = 2 * kHeadDim * (kQ + 2 * kK);  // Q, K, V
};

// A block owns kK keys and passes over the queries. Its warps lie in a grid over each product: k*Down of them along the
// rows, the rest along the columns.
template <int kHeadDim>
struct BackwardTile {
  static constexpr int kQ = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kK = kHeadDim <= 192 ? 64 : 32;
  static constexpr int kWarps = kHeadDim == 192 ? 8 : 4;
  static constexpr int kScoreDown = 2;  // warps along the queries of S and dP
  static constexpr int kKeyDown = 2;    // warps along the keys of dK and dV
  static constexpr int kQueryDown = 2;  // warps along the queries of dQ
  static constexpr int kBlocksPerSm = kHeadDim == 192 ? 1 : 2;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kSharedBytes = 2 * (kHeadDim * (2 * kK + 3 * kQ) + 2 * kQ * kK);  // K, V, Q twice, dO; P, dS
};

// Of Gradients::dq_accumulator: dQ in f32, in whole tiles.
template <int kHeadDim>
int64_t dq_accumulator_floats(const Problem& p) {
  constexpr int kQ = BackwardTile<kHeadDim>::kQ;
  const int64_t tiles = (p.shape.q_len + kQ - 1) / kQ;
  return int64_t(p.shape.batch) * p.shape.heads * tiles * kQ * kHeadDim;
}

// The passes that own queries (dQ in a fixed order) or scores (the bias gradient), and pass over the rest.
template <int kHeadDim>
struct RecomputeTile {
  static constexpr int kQ = 64;
  static constexpr int kK = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRowsPerWarp = kQ / kWarps;
};

}  // namespace jfa::sm80

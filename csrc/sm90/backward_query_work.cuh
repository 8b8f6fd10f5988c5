// What the roles of the kernel for dQ share: the arguments and the picture of shared memory. Items are the forward's.
#pragma once

#include <type_traits>

#include "sm90/backward_query_tiles.h"
#include "sm90/forward_work.cuh"
#include "sm90/staged_scores.cuh"

namespace jfa::sm90 {

struct BackwardQueryArguments {
  TensorMap q, d_o, k, v;
  Problem p;
  Gradients g;
  WorkOrder order;
  SequenceTiles tiles;
  uint32_t* counter;  // of items drawn; 0 before
  TensorMap scores;   // what is staged
  StagedScores staged;
  int staged_row_mask;
};

template <class Shape>
struct BackwardQueryScores {
  struct {
    Tile<kWarpgroupRows, Shape::kK> scores[Shape::kWarpgroups];
  } staged;
};

template <class Shape>
struct BackwardQuerySmem : std::conditional_t<Shape::kStagesScores, BackwardQueryScores<Shape>, NoScores> {
  struct Rows {  // of one warpgroup
    Tile<kWarpgroupRows, Shape::kHeadDim> q;
    Tile<kWarpgroupRows, Shape::kValueDim> d_o;
  };
  using Keys = Tile<Shape::kK, Shape::kHeadDim>;
  using Values = Tile<Shape::kK, Shape::kValueDim>;
  using StagedBias = Tile<kWarpgroupRows, Shape::kK>;
  using StagedMask = ByteTile<kWarpgroupRows, swizzled_bytes(Shape::kK)>;

  Rows rows[Shape::kWarpgroups];
  Keys k[Shape::kKeyPlaces];
  Values v[Shape::kValuePlaces];
  alignas(8) uint64_t item_ready[kItems];
  uint64_t rows_full[Shape::kWarpgroups], rows_free[Shape::kWarpgroups];
  uint64_t k_full[Shape::kKeyPlaces], k_free[Shape::kKeyPlaces];
  uint64_t v_full[Shape::kValuePlaces], v_free[Shape::kValuePlaces];
  uint64_t landed;  // a tile of K that has to be cleaned before it is full
  alignas(kItemBytes) unsigned char items[kItems][kItemBytes];
  uint64_t staged_full[Shape::kWarpgroups][kStagedPlaces], staged_free[Shape::kWarpgroups][kStagedPlaces];
};

}  // namespace jfa::sm90

// The Hopper family as the rest of the library sees it: sm_90, and nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "attention.h"
#include "dispatch.h"
#include "launch.h"
#include "problem.h"
#include "sm90/backward_bias_tiles.h"
#include "sm90/backward_query_tiles.h"
#include "sm90/backward_tiles.h"
#include "sm90/backward_wide_tiles.h"
#include "sm90/tiles.h"

namespace jfa::sm90 {

// Whether this build has the family.
#ifdef JFA_SM90
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

struct Sm90 {};  // names this family's copies of common kernels

// `counter`: scratch, one number.
template <int kHeadDim>
Status launch_forward(const Problem& p, uint32_t* counter, int multiprocessors, cudaStream_t stream);

// Everything but the bias gradient.
template <int kHeadDim>
Status launch_backward(const Problem& p, const Gradients& g, int multiprocessors, cudaStream_t stream);

// That, where has_bias_tiles() and after launch_backward(), of which it needs delta.
template <int kHeadDim>
Status launch_bias(const Problem& p, const Gradients& g, int multiprocessors, cudaStream_t stream);

// Calls f(Type<ForwardTile<...>>, std::bool_constant) with the tile that a call runs, and whether scores are general.
template <int kHeadDim, class F>
auto with_forward_tile(const Problem& p, int multiprocessors, F&& f) {
  const auto with_value_dim = [&](auto value_dim) {
    using Tiles = ForwardTiles<kHeadDim, value_dim.value>;
    const auto with_sight = [&](auto tile, auto general) {
      using Tile = typename decltype(tile)::type;
      return reads_visibility(p) ? f(Type<typename Tile::Seeing>{}, general) : f(tile, general);
    };
    switch (forward_kind(p, multiprocessors, pairs_heads<typename Tiles::Long>(p))) {
      case ForwardKind::kGeneralDense:
        return f(Type<typename Tiles::GeneralDense>{}, std::true_type{});
      case ForwardKind::kGeneral:
        return with_sight(Type<typename Tiles::General>{}, std::true_type{});
      case ForwardKind::kDropping:
        return with_sight(Type<typename Tiles::Dropping>{}, std::true_type{});
      case ForwardKind::kStaging:
        return f(Type<typename Tiles::Staging>{}, std::true_type{});
      case ForwardKind::kStagingDropping:
        return f(Type<typename Tiles::StagingDropping>{}, std::true_type{});
      case ForwardKind::kReading:
        return f(Type<typename Tiles::Reading>{}, std::true_type{});
      case ForwardKind::kShort:
        return with_sight(Type<typename Tiles::Short>{}, std::false_type{});
      case ForwardKind::kLong:
        return with_sight(Type<typename Tiles::Long>{}, std::false_type{});
      case ForwardKind::kShortDense:
        return f(Type<typename Tiles::ShortDense>{}, std::false_type{});
      case ForwardKind::kDense:
        break;
    }
    return f(Type<typename Tiles::Dense>{}, std::false_type{});
  };
  if constexpr (kHeadDim == 192) {
    if (p.shape.value_dim <= 128) return with_value_dim(std::integral_constant<int, 128>{});
  }
  return with_value_dim(std::integral_constant<int, kHeadDim>{});
}

// `listed`: the device knows how many items there are, and the host only that there are not more.
inline std::string describe(const WorkOrder& order, bool drawn, bool listed) {
  return (listed ? "at most " : "") + std::to_string(order.items) + " items, " +
         (drawn ? "drawn longest first in sections of " + std::to_string(order.section_heads * order.item_heads) +
                      " heads"
                : std::string("dealt out in turn"));
}

// How a bias or a mask comes to those who compute, if there may be one.
template <class Tile>
std::string describe_scores(const Problem& p) {
  if (Tile::kStagesScores) return p.scores.mask.data != nullptr ? ", mask by TMA" : ", bias by TMA";
  return Tile::kReadsScores ? ", bias and mask read by each thread" : "";
}

// Everything of a plan but its scratch and the reasons for the family.
template <int kHeadDim>
void plan_forward(const Problem& p, int multiprocessors, Plan& plan) {
  with_forward_tile<kHeadDim>(p, multiprocessors, [&](auto tile, auto) {
    using Tile = typename decltype(tile)::type;
    plan.head_dim = Tile::kHeadDim;
    plan.q_tile = Tile::kQ;
    plan.k_tile = Tile::kK;
    plan.warps = Tile::kThreads / 32;
    plan.shared_memory_bytes = Tile::kSharedBytes;
    const WorkOrder order = forward_order<Tile>(p);
    const char* clusters = Tile::kCluster == 1    ? ""
                           : order.item_heads > 1 ? " in clusters, for two heads of a group"
                                                  : " in clusters, for two query tiles";
    plan.schedule = describe(order, order.drawn, tiles_sequences(p)) + ", over persistent blocks" + clusters + "; " +
                    std::to_string(Tile::kSlots) + " key and value tiles in flight" +
                    (Tile::kQueryInRegisters ? ", queries in registers" : "") +
                    (Tile::kStoreByTma ? ", stores by TMA" : "");
    plan.schedule += describe_scores<Tile>(p);
  });
}

// The same of a backward: of the kernel that owns keys, but for the shared memory, which is that of the largest kernel,
// and the schedule, which names all.
template <int kHeadDim>
void plan_backward(const Problem& p, const Gradients& g, Plan& plan) {
  constexpr bool kHasQueryKernel = kHeadDim > 128;
  const auto of_keys = [&](auto tile, int k_tile, const WorkOrder& order) {
    using Tile = typename decltype(tile)::type;
    plan.head_dim = Tile::kHeadDim;
    plan.q_tile = Tile::kQ;
    plan.k_tile = k_tile;
    plan.warps = Tile::kThreads / 32;
    plan.shared_memory_bytes = Tile::kSharedBytes;
    plan.schedule = "persistent blocks: dK and dV by key tiles, " + describe(order, true, tiles_sequences_backward(p)) +
                    (kHasQueryKernel   ? ""
                     : g.deterministic ? ", and dQ by float32 additions from all of them, in the order of keys"
                                       : ", and dQ by float32 additions from all of them") +
                    describe_scores<Tile>(p);
  };
  if constexpr (kHeadDim <= 128) {
    with_backward_tile<kHeadDim>(p, [&](auto tile, auto) {
      constexpr int kKeys = decltype(tile)::type::kK;
      of_keys(tile, kKeys, backward_order(p, decltype(tile)::type::kQ, kKeys, g.deterministic));
    });
  } else {
    with_backward_wide_tile<kHeadDim>(p, [&](auto tile, auto) {
      constexpr int kKeys = decltype(tile)::type::kKeys;
      of_keys(tile, kKeys, backward_wide_order(p, decltype(tile)::type::kClusterKeys));
    });
  }
  const auto add_kernel = [&](auto tile, const std::string& what) {
    using Tile = typename decltype(tile)::type;
    plan.shared_memory_bytes = std::max<int64_t>(plan.shared_memory_bytes, Tile::kSharedBytes);
    plan.schedule += "; " + what + ", " + std::to_string(Tile::kQ) + " x " + std::to_string(Tile::kK);
  };
  if constexpr (kHasQueryKernel) {
    with_backward_query_tile<kHeadDim>(p, [&](auto tile, auto) {
      const bool listed = tiles_sequences_backward(p);
      const WorkOrder order = forward_order(p, decltype(tile)::type::kQ, 1, listed);
      add_kernel(tile, "dQ by query tiles");
      plan.schedule += ", " + describe(order, order.drawn, listed) + describe_scores<typename decltype(tile)::type>(p);
    });
  }
  if (g.d_bias.data == nullptr) return;
  if (has_bias_tiles(p)) {
    with_backward_bias_tile<kHeadDim>(p, [&](auto tile) { add_kernel(tile, "the gradient of the bias by its tiles"); });
  } else {
    plan.schedule += "; the gradient of the bias by the portable family";
  }
}

}  // namespace jfa::sm90

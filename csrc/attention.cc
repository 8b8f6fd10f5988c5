// The one place that picks a family and a compiled head dim.
#include "attention.h"

#include <algorithm>

#include "dispatch.h"
#include "sm80/family.h"

namespace jfa {
namespace {

using HeadDims = IntList<JFA_HEAD_DIMS>;

int64_t delta_floats(const Problem& p) { return int64_t(p.shape.batch) * p.shape.heads * p.shape.q_len; }

// Checks what every family relies on, and calls f with the compiled head dim.
template <class F>
Status choose(const Problem& p, const std::string& family, F&& f) {
  if (family != "auto" && family != "sm80") {
    return Status::Unimplemented("no kernel family '" + family + "' in this build; it has sm80");
  }
  if (p.shape.q_len > kMaxSequence || p.shape.k_len > kMaxSequence) {
    return Status::Unimplemented("a sequence of " + std::to_string(std::max(p.shape.q_len, p.shape.k_len)) +
                                 " is longer than " + std::to_string(kMaxSequence));
  }
  for (const int dim : {p.shape.head_dim, p.shape.value_dim}) {
    if (dim % 8 != 0) {
      return Status::Unimplemented("head dim " + std::to_string(dim) + " is not a multiple of 8; the nearest is " +
                                   std::to_string((dim + 7) / 8 * 8));
    }
  }
  const int dim = std::max(p.shape.head_dim, p.shape.value_dim);
  return at_least(HeadDims{}, dim, "the larger of head dim and value dim", f);
}

Status fill(Plan& plan, int head_dim, int q_tile, int k_tile, int warps, int64_t shared_bytes, int64_t available,
            const Problem& p) {
  plan.family = "sm80";
  plan.head_dim = head_dim;
  plan.q_tile = q_tile;
  plan.k_tile = k_tile;
  plan.warps = warps;
  plan.shared_memory_bytes = shared_bytes;
  plan.why = is_general(p.scores) ? "bias, mask or a scale on the device: general scores" : "plain scores";
  if (shared_bytes > available) {
    return Status::Unimplemented("head dim " + std::to_string(head_dim) + " needs " + std::to_string(shared_bytes) +
                                 " bytes of shared memory in a block; the device has " + std::to_string(available));
  }
  return Status::Ok();
}

}  // namespace

Status plan_forward(const Problem& p, const std::string& family, int64_t shared_memory_bytes, Plan& plan) {
  return choose(p, family, [&](auto dim) {
    using Tile = sm80::ForwardTile<dim.value>;
    return fill(plan, dim.value, Tile::kQ, Tile::kK, Tile::kWarps, Tile::kSharedBytes, shared_memory_bytes, p);
  });
}

Status plan_backward(const Problem& p, const Gradients& g, const std::string& family, int64_t shared_memory_bytes,
                     Plan& plan) {
  return choose(p, family, [&](auto dim) {
    using Tile = sm80::BackwardTile<dim.value>;
    plan.scratch_floats = delta_floats(p) + (g.deterministic ? 0 : sm80::dq_accumulator_floats<dim.value>(p));
    return fill(plan, dim.value, Tile::kQ, Tile::kK, Tile::kWarps, Tile::kSharedBytes, shared_memory_bytes, p);
  });
}

Status forward(const Problem& p, const std::string& family, cudaStream_t stream) {
  return choose(p, family, [&](auto dim) { return sm80::launch_forward<dim.value>(p, stream); });
}

Status backward(const Problem& p, Gradients g, float* scratch, int64_t scratch_floats, const std::string& family,
                cudaStream_t stream) {
  return choose(p, family, [&](auto dim) {
    const int64_t needed = delta_floats(p) + (g.deterministic ? 0 : sm80::dq_accumulator_floats<dim.value>(p));
    if (scratch_floats < needed) {
      return Status::InvalidArgument("scratch has " + std::to_string(scratch_floats) + " floats; this call needs " +
                                     std::to_string(needed));
    }
    g.delta = scratch;
    g.dq_accumulator = g.deterministic ? nullptr : scratch + delta_floats(p);
    return sm80::launch_backward<dim.value>(p, g, stream);
  });
}

}  // namespace jfa

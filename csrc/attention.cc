// The one place that picks a family and a compiled head dim.
#include "attention.h"

#include <algorithm>

#include "dispatch.h"
#include "sm80/family.h"
#include "sm90/family.h"

namespace jfa {
namespace {

using HeadDims = IntList<JFA_HEAD_DIMS>;

static_assert(sizeof(float) == sizeof(uint32_t), "counters and tables take floats' places");

// Scratch is a sequence of parts; the table, of 16 bytes a record, is the last, and comes after a multiple of them. In
// a forward the tiles of packed sequences may stand in its place.
int64_t with_table(const Problem& p, int64_t floats) {
  const int64_t records = std::max(table_records(p.shape), sm90::sequence_tile_records(p));
  return needs_table(p.visibility) ? (floats + 3) / 4 * 4 + 4 * records : floats;
}
int* table_in(const Problem& p, float* scratch, int64_t floats) {
  return needs_table(p.visibility) ? reinterpret_cast<int*>(scratch + (floats + 3) / 4 * 4) : nullptr;
}

constexpr int64_t kForwardCounterFloats = 1;

// Of Gradients, for a family.
template <int kHeadDim>
int64_t cleared_floats(const Problem& p, const Gradients& g, bool hopper) {
  int64_t floats = kBackwardCounters;
  if (hopper) {
    floats += sm90::dq_accumulator_floats<kHeadDim>(p);
    if (g.deterministic) floats += sm90::rows_to_come_floats<kHeadDim>(p);
  } else if (!g.deterministic) {
    floats += sm80::dq_accumulator_floats<kHeadDim>(p);
  }
  return floats;
}
int64_t delta_floats(const Problem& p) { return int64_t(p.shape.batch) * p.shape.heads * p.shape.q_len; }

// Checks what every family relies on, and calls f with the compiled head dim.
template <class F>
Status choose(const Problem& p, F&& f) {
  if (p.visibility.sink_tokens > 0 && (p.visibility.q_segments != nullptr || p.visibility.cu_q != nullptr)) {
    return Status::Unimplemented("sink tokens are the first of the whole sequence; not of segments or packed ones");
  }
  if (p.shape.q_len > kMaxSequence || p.shape.k_len > kMaxSequence) {
    return Status::Unimplemented("a sequence of " + std::to_string(std::max(p.shape.q_len, p.shape.k_len)) +
                                 " is longer than " + std::to_string(kMaxSequence));
  }
  if (needs_table(p.visibility) && table_records(p.shape) > kUnbounded) {
    return Status::Unimplemented("a table of " + std::to_string(table_records(p.shape)) +
                                 " records of who sees whom is larger than " + std::to_string(kUnbounded));
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

// Which family runs a pass, and why.
struct Family {
  bool hopper = false;
  std::string why;
};

Status choose_family(const std::string& name, const Device& device, Family& family) {
  constexpr int kOldest = 80;
  constexpr int kHopper = 90;  // its machine code runs on no other GPU, newer ones included
  const std::string capability =
      std::to_string(device.compute_capability / 10) + "." + std::to_string(device.compute_capability % 10);
  if (device.compute_capability < kOldest) {
    return Status::Unimplemented("the kernels need compute capability 8.0 or newer, and the device has " + capability);
  }
  std::string against;
  if (!sm90::kBuilt) {
    against = "this build has no sm90 kernels";
  } else if (device.compute_capability != kHopper) {
    against = "sm90 kernels need compute capability 9.0, and the device has " + capability;
  }
  if (name == "sm90") {
    if (!against.empty()) return Status::Unimplemented(against + "; the nearest family is sm80");
    family = {true, "asked for"};
  } else if (name == "sm80") {
    family = {false, "asked for"};
  } else if (name == "auto") {
    family = {against.empty(), against.empty() ? "compute capability 9.0" : against};
  } else {
    return Status::Unimplemented("no kernel family '" + name + "'; there are sm80 and sm90");
  }
  return Status::Ok();
}

// What comes before a pass's kernels, in words.
constexpr char kSequenceTiles[] = "; before it the tiles of each sequence";
const char* table_of(const Problem& p) {
  return needs_table(p.visibility) ? "; before it who sees whom, as a table in scratch" : "";
}

Status finish_plan(const Problem& p, const Family& family, const Device& device, const char* before, Plan& plan) {
  plan.family = family.hopper ? "sm90" : "sm80";
  plan.why = family.why + (is_general(p.scores) ? "; general scores" : "; plain scores");
  plan.schedule += before;
  if (plan.shared_memory_bytes > device.shared_memory_bytes) {
    return Status::Unimplemented(
        "head dim " + std::to_string(plan.head_dim) + " needs " + std::to_string(plan.shared_memory_bytes) +
        " bytes of shared memory in a block; the device has " + std::to_string(device.shared_memory_bytes));
  }
  return Status::Ok();
}

// The tile of the portable family that `plan` describes.
template <class Tile>
void describe_tile(int head_dim, Plan& plan) {
  plan.head_dim = head_dim;
  plan.q_tile = Tile::kQ;
  plan.k_tile = Tile::kK;
  plan.warps = Tile::kWarps;
  plan.shared_memory_bytes = Tile::kSharedBytes;
  plan.schedule = "one block per tile, longest first";
}

Status current_device(Device& device) {
  int ordinal = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, ordinal);
  };
  read(major, cudaDevAttrComputeCapabilityMajor);
  read(minor, cudaDevAttrComputeCapabilityMinor);
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  device.compute_capability = 10 * major + minor;
  return cuda_status(error, "jax_flashattn: reading the device's attributes");
}

Status check_scratch(int64_t given, int64_t needed) {
  if (given >= needed) return Status::Ok();
  return Status::InvalidArgument("scratch has " + std::to_string(given) + " floats; this call needs " +
                                 std::to_string(needed));
}

}  // namespace

Status plan_forward(const Problem& p, const std::string& family_name, const Device& device, Plan& plan) {
  Family family;
  const Status status = choose_family(family_name, device, family);
  if (!status.ok()) return status;
  return choose(p, [&](auto dim) {
    plan.scratch_floats = with_table(p, kForwardCounterFloats);
    if (family.hopper) {
      sm90::plan_forward<dim.value>(p, device.multiprocessors, plan);
    } else {
      describe_tile<sm80::ForwardTile<dim.value>>(dim.value, plan);
    }
    return finish_plan(p, family, device, family.hopper && sm90::tiles_sequences(p) ? kSequenceTiles : table_of(p),
                       plan);
  });
}

Status plan_backward(const Problem& p, const Gradients& g, const std::string& family_name, const Device& device,
                     Plan& plan) {
  Family family;
  const Status status = choose_family(family_name, device, family);
  if (!status.ok()) return status;
  return choose(p, [&](auto dim) {
    // For whichever family a device has: what XLA is told of scratch depends on none.
    const int64_t cleared = std::max(cleared_floats<dim.value>(p, g, false), cleared_floats<dim.value>(p, g, true));
    plan.scratch_floats = with_table(p, cleared + delta_floats(p));
    if (family.hopper) {
      sm90::plan_backward<dim.value>(p, g, plan);
    } else {
      describe_tile<sm80::BackwardTile<dim.value>>(dim.value, plan);
    }
    return finish_plan(p, family, device,
                       family.hopper && sm90::tiles_sequences_backward(p) ? kSequenceTiles : table_of(p), plan);
  });
}

Status forward(Problem p, float* scratch, int64_t scratch_floats, const std::string& family_name, cudaStream_t stream) {
  Device device;
  Family family;
  Status status = current_device(device);
  if (status.ok()) status = check_scratch(scratch_floats, with_table(p, kForwardCounterFloats));
  if (status.ok()) status = choose_family(family_name, device, family);
  if (!status.ok()) return status;
  p.visibility.table = table_in(p, scratch, kForwardCounterFloats);
  return choose(p, [&](auto dim) {
    if constexpr (sm90::kBuilt) {
      if (family.hopper) {
        return sm90::launch_forward<dim.value>(p, reinterpret_cast<uint32_t*>(scratch), device.multiprocessors, stream);
      }
    }
    return sm80::launch_forward<dim.value>(p, stream);
  });
}

Status backward(Problem p, Gradients g, float* scratch, int64_t scratch_floats, const std::string& family_name,
                cudaStream_t stream) {
  Device device;
  Family family;
  Status status = current_device(device);
  if (status.ok()) status = choose_family(family_name, device, family);
  if (!status.ok()) return status;
  return choose(p, [&](auto dim) {
    g.cleared_floats = cleared_floats<dim.value>(p, g, family.hopper);
    const int64_t before_table = g.cleared_floats + delta_floats(p);
    Status launched = check_scratch(scratch_floats, with_table(p, before_table));
    if (!launched.ok()) return launched;
    g.dq_accumulator = scratch;
    g.rows_to_come = reinterpret_cast<uint64_t*>(scratch + sm90::dq_accumulator_floats<dim.value>(p));
    g.counters = reinterpret_cast<uint32_t*>(scratch + g.cleared_floats - kBackwardCounters);
    g.delta = scratch + g.cleared_floats;
    p.visibility.table = table_in(p, scratch, before_table);
    if constexpr (sm90::kBuilt) {
      if (family.hopper) launched = sm90::launch_backward<dim.value>(p, g, device.multiprocessors, stream);
    }
    if (!family.hopper) launched = sm80::launch_backward<dim.value>(p, g, stream);
    if (!launched.ok() || g.d_bias.data == nullptr) return launched;
    if constexpr (sm90::kBuilt) {
      if (family.hopper && sm90::has_bias_tiles(p)) {
        return sm90::launch_bias<dim.value>(p, g, device.multiprocessors, stream);
      }
    }
    return sm80::launch_bias<dim.value>(p, g, stream);
  });
}

}  // namespace jfa

// Where threads meet.
#include "machine.h"

namespace emulator {

void Machine::barrier(int id, int participants, const Where& where) {
  Gate& gate = named_gate(id, participants, where);
  meet(gate, where, [&] {
    if (participants == count_ && gate.passed.empty()) {
      clocks_.join_all();
    } else {
      clocks_.join(gate.arrived, gate.told);
    }
  });
}

void Machine::pass_barrier(int id, int participants, const Where& where) {
  note(where);
  Gate& gate = named_gate(id, participants, where);
  clocks_.publish(running_, gate.told);
  gate.passed.push_back(running_);
  if (complete(gate)) open(gate, [&] { clocks_.join(gate.arrived, gate.told); });
}

void Machine::warp_barrier(const Where& where) {
  Gate& gate = warp_gate(where);
  meet(gate, where, [&] { clocks_.join(gate.arrived); });
}

void Machine::cluster_barrier(const Where& where) {
  cluster_gate_.participants = alive_;  // those that have returned are not waited for
  meet(cluster_gate_, where, [&] { clocks_.join(cluster_gate_.arrived); });
}

void Machine::meet_warpgroup(const Where& where) {
  if (launch_.threads % kWarpgroup != 0) fail(where, "the block has no whole warpgroups");
  Gate& gate = mine().warpgroup_gates[thread() / kWarpgroup];
  if (!gate.arrived.empty() && strcmp(gate.instruction, where.instruction) != 0) {
    fail(where, text("the warpgroup diverged: thread %d is at ", gate.arrived[0]) + gate.instruction);
  }
  gate.participants = kWarpgroup;
  meet(gate, where, [] {});
}

Machine::Gate& Machine::warp_gate(const Where& where) {
  Gate& gate = warps_[running_ / kWarp];
  if (!gate.arrived.empty() && strcmp(gate.instruction, where.instruction) != 0) {
    fail(where, text("the warp diverged: lane %d is at ", gate.arrived[0] % kWarp) + gate.instruction);
  }
  return gate;
}

Machine::Gate& Machine::named_gate(int id, int participants, const Where& where) {
  if (id < 0 || id >= Block::kBarriers) fail(where, text("barrier %d of %d", id, Block::kBarriers));
  if (participants <= 0 || participants % kWarp != 0) fail(where, text("a barrier of %d threads", participants));
  Gate& gate = mine().barriers[id];
  const bool in_use = !gate.arrived.empty() || !gate.passed.empty();
  if (in_use && gate.participants != participants) {
    fail(where, text("barrier %d for %d threads and for %d at once", id, gate.participants, participants));
  }
  if (std::find(gate.passed.begin(), gate.passed.end(), running_) != gate.passed.end()) {
    fail(where, text("arrives twice at barrier %d", id));
  }
  gate.participants = participants;
  return gate;
}

}  // namespace emulator

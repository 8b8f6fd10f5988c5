// mbarriers: who arrives, what bytes are to come, who waits.
#include "mbarrier.h"

namespace emulator {

void mbarrier_init(uint32_t address, int arrivals, const Where& where) {
  Machine& m = machine();
  Machine::Block& block = m.mine();
  m.note(where);
  block.shared.make_mbarrier(m.running(), address, where);
  if (arrivals < 1 || arrivals >= 1 << 20) fail(where, text("an mbarrier for %d arrivals", arrivals));
  Mbarrier b;
  b.address = address;
  const std::string rank = m.cluster() > 1 ? text(" of the cluster's block %d", m.rank()) : "";
  b.agent = m.clocks().add_agent(text("the mbarrier at byte %d", offset_in_block(address)) + rank, where);
  b.initialiser = m.running();
  b.init_clock = m.clocks().now(m.running());
  b.count = b.pending = arrivals;
  b.waited.assign(m.threads() * m.cluster(), -2);
  block.mbarriers.push_back(std::move(b));
}

Mbarrier& find_mbarrier(Machine::Block& block, uint32_t address, bool fenced, const Where& where) {
  Machine& m = machine();
  for (Mbarrier& b : block.mbarriers) {
    if (b.address != address) continue;
    if (!m.clocks().known(m.running(), b.initialiser, b.init_clock)) {
      fail(where, text("uses the mbarrier at byte %d; no barrier lies between its mbarrier_init and this",
                       offset_in_block(address)));
    }
    if (fenced && !m.clocks().init_fenced(b.initialiser, b.init_clock)) {
      fail(where,
           text("no mbarrier_init_fence after the mbarrier_init of the one at byte %d", offset_in_block(address)));
    }
    return b;
  }
  fail(where, text("no mbarrier was initialised at byte %d", offset_in_block(address)));
}

// Ends the phase if nothing is to come.
static void settle(Mbarrier& b, const Where& where) {
  if (b.pending > 0) return;
  if (b.bytes < 0) {
    fail(where, text("%lld bytes more have landed than were announced to phase %d of the mbarrier at byte %d",
                     static_cast<long long>(-b.bytes), b.phases, offset_in_block(b.address)));
  }
  if (b.bytes > 0) return;
  b.pending = b.count;
  ++b.phases;
  b.told.resize(std::max<size_t>(b.told.size(), b.agent + 1));
  b.told[b.agent] = b.phases;
  b.ended_told = b.told;
  for (int t : b.waiting) machine().wake(t);
  b.waiting.clear();
}

static void announce(Mbarrier& b, int bytes, const Where& where) {
  if (bytes < 0 || b.bytes + bytes >= 1 << 20) fail(where, text("announces %d bytes", bytes));
  b.bytes += bytes;
}

static void arrive(Mbarrier& b, const Where& where) {
  if (b.pending == 0) {
    fail(where, text("arrives at phase %d of the mbarrier at byte %d, to which all %d arrivals have come", b.phases,
                     offset_in_block(b.address), b.count));
  }
  machine().clocks().publish(machine().running(), b.told);
  --b.pending;
  settle(b, where);
}

void touch_block(Machine::Block& block, int actor, uint32_t clock, const Where& where) {
  if (block.alive == 0) fail(where, "a block of the cluster has ended, and this comes to its shared memory");
  if (int(block.touched.size()) <= actor) block.touched.resize(actor + 1);
  block.touched[actor] = std::max(block.touched[actor], clock);
}

void mbarrier_arrive(uint32_t address, int bytes, const Where& where) {
  Machine& m = machine();
  Mbarrier& b = find_mbarrier(m.mine(), address, false, m.note(where));
  announce(b, bytes, where);
  arrive(b, where);
}

void mbarrier_arrive_remote(uint32_t address, int rank, const Where& where) {
  Machine& m = machine();
  Machine::Block& block = m.block_of_rank(rank, m.note(where));
  if (rank != m.rank()) touch_block(block, m.running(), m.clocks().now(m.running()), where);
  arrive(find_mbarrier(block, address, rank != m.rank(), where), where);
}

bool mbarrier_wait(uint32_t address, uint32_t parity, bool may_sleep, const Where& where) {
  Machine& m = machine();
  Mbarrier& b = find_mbarrier(m.mine(), address, false, m.note(where));
  if (parity > 1) fail(where, text("waits for a phase of parity %u", parity));
  // The phase it means: the next one of that parity. At first parity 1 is that of the phase before the first.
  int& waited = b.waited[m.running()];
  const int next = uint32_t((waited + 1) & 1) == parity ? waited + 1 : waited + 2;
  if (b.phases >= next + 2) {
    fail(where, text("waits for phase %d of the mbarrier at byte %d, which is in phase %d: the parity cannot tell",
                     next, offset_in_block(address), b.phases));
  }
  if (uint32_t(b.phases & 1) == parity) {
    if (!may_sleep) return false;
    const int phase = b.phases;
    b.waiting.push_back(m.running());
    m.sleep(where, &b);
    if (b.phases > phase + 1) {
      fail(where, text("while this waited for phase %d of the mbarrier at byte %d, phase %d ended as well: the parity "
                       "cannot tell",
                       phase, offset_in_block(address), b.phases - 1));
    }
  }
  waited = b.phases - 1;
  m.clocks().acquire(m.running(), b.ended_told);
  return true;
}

void complete_bytes(Mbarrier& b, int bytes, const Where& where) {
  b.bytes -= bytes;
  settle(b, where);
}

}  // namespace emulator

// How threads, blocks and launches end, well or not.
#include "machine.h"

namespace emulator {

static std::string short_path(const char* path) {
  const char* inside = strstr(path, "csrc/");
  return inside == nullptr ? path : inside;
}

void Machine::stop(const Where& where, const std::string& what) {
  fault_ = text("block %d, thread %d (warp %d, lane %d), %s in %s(), %s:%d: ", block(), thread(), thread() / kWarp,
                thread() % kWarp, where.instruction, where.site.function, short_path(where.site.file).c_str(),
                where.site.line) +
           what;
  leave(threads_[running_].fiber);
}

void Machine::stop_at_plain_access(const void* p) {
  const Where last = threads_[running_].last;
  if (stacks_.contains(p)) stop(last, "after this the fiber's stack overflowed");
  std::string what = text("address %p", p);
  if (global_.contains(p)) what = "global memory";
  if (SharedMemory::window().contains(p)) {
    what = text("shared memory, byte %td", static_cast<const unsigned char*>(p) - SharedMemory::window_begin());
  }
  stop(last, "after this a plain load or store touched " + what + ", not through device.cuh or ptx.cuh");
}

void Machine::finish_thread() {
  check_end_of_thread();
  Thread& me = threads_[running_];
  if (--mine().alive == 0) check_end_of_block();
  me.done = true;
  if (--alive_ == 0) {
    while (!deferred_.empty()) act(0);  // which say what is wrong with coming so late
    leave(me.fiber);
  }
  if (int(cluster_gate_.arrived.size()) == alive_ && !cluster_gate_.arrived.empty()) {
    open(cluster_gate_, [&] { clocks_.join(cluster_gate_.arrived); });
  }
  switch_to_next(me.fiber);
}

void Machine::check_end_of_thread() {
  const Thread& me = threads_[running_];
  const Storer& stores = me.storer;
  if (stores.issued > stores.committed) fail(me.last, "the thread ends with TMA stores that it never committed");
  if (stores.committed > stores.read) {
    fail(me.last, "the thread ends with TMA stores that it never waited for: their shared memory may be gone");
  }
  const size_t warpgroup = thread() / kWarpgroup;
  if (warpgroup >= mine().warpgroups.size()) return;
  const Warpgroup::Lane& lane = mine().warpgroups[warpgroup].lanes[thread() % kWarpgroup];
  if (lane.issued > lane.waited) fail(me.last, "the thread ends with wgmma products that it never waited for");
}

// What others do to the block's shared memory must be known to one of its threads when it ends.
void Machine::check_end_of_block() {
  const int first = rank_ * launch_.threads;
  for (size_t actor = 0; actor < mine().touched.size(); ++actor) {
    const uint32_t clock = mine().touched[actor];
    bool known = clock == 0;
    for (int t = first; t < first + launch_.threads && !known; ++t) known = clocks_.known(t, int(actor), clock);
    if (known) continue;
    fail(threads_[running_].last, "the block ends, and none of its threads has waited for what " +
                                      clocks_.name(int(actor)) + " does to its shared memory");
  }
}

std::string Machine::who_waits_where() const {
  std::string all;
  for (int begin = 0, end; begin < count_; begin = end) {
    const int stop = (begin / launch_.threads + 1) * launch_.threads;
    const std::string state = describe(threads_[begin]);
    for (end = begin + 1; end < stop && describe(threads_[end]) == state;) ++end;
    all += all.empty() ? "" : "; ";
    if (launch_.cluster > 1) all += text("block %d, ", first_block_ + begin / launch_.threads);
    all += text("threads %d-%d ", begin % launch_.threads, (end - 1) % launch_.threads) + state;
  }
  return all;
}

std::string Machine::describe(const Thread& thread) const {
  if (thread.done) return "have returned";
  const Site& site = thread.last.site;
  std::string state = text("wait in %s, called by %s(), %s:%d", thread.last.instruction, site.function,
                           short_path(site.file).c_str(), site.line);
  if (const Mbarrier* on = thread.waits_on) {
    state += text(" (for phase %d of the mbarrier at byte %d: %d of %d arrivals and %lld bytes to come)", on->phases,
                  int(on->address - SharedMemory::kBase), on->pending, on->count, static_cast<long long>(on->bytes));
  }
  return state;
}

}  // namespace emulator

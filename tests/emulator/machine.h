// A SIMT machine: every CUDA thread of a block is a fiber, which runs until it waits for others. The blocks of a
// cluster run together, clusters one after another. Which fiber runs next is drawn from a seed, and so is when that
// happens which threads start and do not do themselves.
#pragma once

#include <functional>
#include <numeric>

#include "async.h"
#include "global.h"
#include "settings.h"
#include "shared.h"

namespace emulator {

class Machine {
 public:
  struct Gate {
    int participants = kWarp;
    const char* instruction = nullptr;
    std::vector<int> arrived;  // threads that wait
    std::vector<int> passed;   // threads that only arrived, and what they knew then
    Clocks::Knowledge told;
  };
  // One block of the cluster.
  struct Block {
    static constexpr int kBarriers = 16, kRegisters = 65536;

    Block(const Launch& launch, Clocks& clocks) : shared(launch.shared_bytes, clocks) {}

    SharedMemory shared;
    Gate barriers[kBarriers];
    std::vector<Gate> warpgroup_gates;
    std::vector<int> registers;  // of each thread of a warpgroup
    int register_pool = 0;       // what the block got when it began, summed over warpgroups: all there will be
    std::vector<int> waiting_for_registers;
    std::deque<Mbarrier> mbarriers;
    std::deque<Warpgroup> warpgroups;
    std::vector<uint32_t> touched;  // from outside: by each actor of Clocks, when last
    int alive = 0;
  };

  Machine(const Launch& launch, GlobalMemory& global, const std::function<void()>& kernel)
      : launch_(launch),
        count_(launch.threads * launch.cluster),
        global_(global),
        kernel_(kernel),
        clocks_(count_, launch.threads, 64 * launch.cluster),
        stacks_(count_),
        threads_(count_),
        warps_(count_ / kWarp),
        random_(launch.seed * 2654435761u + 88172645463325252u) {
    for (int rank = 0; rank < launch.cluster; ++rank) blocks_.emplace_back(launch, clocks_);
    leader_ = int(draw(kWarp));
  }

  // Runs one cluster to its end; false when it failed, and fault() says how.
  bool run(int cluster) {
    first_block_ = cluster * launch_.cluster;
    clocks_.reset();
    for (Gate& gate : warps_) gate = Gate();
    cluster_gate_ = Gate();
    runnable_.clear();
    deferred_.clear();
    for (Block& block : blocks_) reset(block);
    for (int t = 0; t < count_; ++t) {
      threads_[t] = Thread();
      threads_[t].fiber.start(stacks_.bottom(t), Stacks::usable_bytes(t), [] {
        current()->kernel_();
        current()->finish_thread();
      });
      runnable_.push_back(t);
    }
    alive_ = count_;
    switch_to_next(main_);
    running_ = -1;
    return fault_.empty();
  }
  const std::string& fault() const { return fault_; }
  const Counters& counters() const { return counters_; }

  // The machine whose fiber runs on this host thread.
  static Machine*& current() {
    // Reached at every instruction of a kernel; a loaded library's default would call a function for the address.
    static thread_local __attribute__((tls_model("initial-exec"))) Machine* machine = nullptr;
    return machine;
  }

  int block() const { return first_block_ + rank_; }
  int blocks() const { return launch_.blocks; }
  int thread() const { return running_ - rank_ * launch_.threads; }
  int threads() const { return launch_.threads; }
  size_t shared_bytes() const { return blocks_[0].shared.size(); }
  // The block's place in its cluster, whose blocks are `cluster()`.
  int rank() const { return rank_; }
  int cluster() const { return launch_.cluster; }
  Counters& count() { return counters_; }
  // The lane that elect_one() elects: always the same one, but no kernel may know which.
  int leader() const { return leader_; }

  const unsigned char* read_shared(uint32_t address, uint32_t size, const Where& where) {
    return mine().shared.read(running_, local(address), size, note(where));
  }
  unsigned char* write_shared(uint32_t address, uint32_t size, const Where& where) {
    return mine().shared.write(running_, local(address), size, note(where));
  }
  const unsigned char* read_global(const void* p, size_t size, const Where& where) {
    return global_.read(thread_in_grid(), p, size, note(where));
  }
  unsigned char* write_global(void* p, size_t size, const Where& where) {
    return global_.write(thread_in_grid(), p, size, note(where));
  }
  unsigned char* add_global(void* p, size_t size, const Where& where) { return global_.add(p, size, note(where)); }

  // Asynchronous copies land when their thread waits for their group, not before: the latest time the ISA allows.
  void start_copy(uint32_t shared, const void* global, uint32_t size, bool valid, const Where& where) {
    Thread& me = threads_[running_];
    shared = local(shared);
    mine().shared.start_copy(running_, shared, size, note(where));
    const unsigned char* source = nullptr;
    if (valid) source = global_.read(thread_in_grid(), global, size, where);
    me.copies.push_back({shared, size, source, me.groups});
  }
  void commit_copies() { ++threads_[running_].groups; }
  void wait_for_copies(int pending) {
    Thread& me = threads_[running_];
    size_t landed = 0;
    for (; landed < me.copies.size() && me.copies[landed].group + pending < me.groups; ++landed) {
      const Copy& copy = me.copies[landed];
      unsigned char* to = mine().shared.land(running_, copy.shared, copy.size);
      if (copy.source == nullptr) {
        memset(to, 0, copy.size);
      } else {
        memcpy(to, copy.source, copy.size);
      }
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + landed);
  }

  // Barrier 0 is the block's; the others have as many participants as each of them says.
  void barrier(int id, int participants, const Where& where);
  // Counts as one of the participants, and goes on.
  void pass_barrier(int id, int participants, const Where& where);
  void warp_barrier(const Where& where);
  void cluster_barrier(const Where& where);
  // What all threads of the warpgroup must come to.
  void meet_warpgroup(const Where& where);

  // An instruction that a warp's lanes execute as one: `complete(lanes)` runs when all have brought their operands.
  // It orders no memory accesses.
  template <class Operand, class Complete>
  void collective(Operand& mine, const Where& where, const Complete& complete) {
    threads_[running_].operand = &mine;
    const int first = running_ / kWarp * kWarp;
    meet(warp_gate(where), where, [&] {
      Operand* lanes[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = static_cast<Operand*>(threads_[first + lane].operand);
      complete(lanes);
    });
  }

  // ---- for the models of mbarriers, TMA and wgmma

  int running() const { return running_; }  // the thread's number in the cluster
  Clocks& clocks() { return clocks_; }
  GlobalMemory& global() { return global_; }
  uint32_t thread_in_grid() const { return uint32_t(first_block_) * launch_.threads + running_; }
  Block& mine() { return blocks_[rank_]; }
  Block& block_of_rank(int rank, const Where& where) {
    if (rank < 0 || rank >= launch_.cluster) fail(where, text("block %d of a cluster of %d", rank, launch_.cluster));
    return blocks_[rank];
  }
  // In a cluster a shared address says whose memory it is.
  static constexpr int kRankShift = 24;
  uint32_t local(uint32_t address) const { return address - (uint32_t(rank_) << kRankShift); }
  Storer& storer() { return threads_[running_].storer; }
  const Where& note(const Where& where) { return threads_[running_].last = where; }
  uint64_t draw(uint64_t choices) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return (random_ >> 32) * choices >> 32;
  }
  // Something that will happen by itself, in the name of the thread that runs now.
  void defer(std::function<void()> action) { deferred_.push_back({running_, std::move(action)}); }
  // Until somebody calls wake() with this thread.
  void sleep(const Where& where, const Mbarrier* on = nullptr) {
    note(where);
    Thread& me = threads_[running_];
    me.waits_on = on;
    switch_to_next(me.fiber);
    me.waits_on = nullptr;
  }
  // Lets others run: for threads that look until something has changed, which they may not do for ever.
  void pause(const Where& where) {
    constexpr int kMostPauses = 1 << 23;  // seconds
    note(where);
    if (++pauses_ > kMostPauses) fail(where, "looks for a change that does not come; " + who_waits_where());
    runnable_.push_back(running_);
    switch_to_next(threads_[running_].fiber);
  }
  void wake(int thread) {
    pauses_ = 0;
    runnable_.push_back(thread);
  }

  // Ends the launch: records the first fault and leaves the fiber for good.
  [[noreturn]] void stop(const Where& where, const std::string& what);
  // A kernel followed a pointer itself: past the functions that translate and check it, or into nowhere.
  [[noreturn]] void stop_at_plain_access(const void* p);
  bool in_kernel() const { return running_ >= 0; }

 private:
  struct Copy {
    uint32_t shared, size;
    const unsigned char* source;  // null: zeros
    int group;
  };
  struct Thread {
    Fiber fiber;
    void* operand = nullptr;  // of the collective instruction it waits in
    Where last{"start", Site()};
    const Mbarrier* waits_on = nullptr;
    bool done = false;
    int groups = 0;  // of copies, committed so far
    std::vector<Copy> copies;
    Storer storer;
  };
  struct Deferred {
    int thread;
    std::function<void()> action;
  };

  void reset(Block& block) {
    block.shared.reset();
    for (Gate& gate : block.barriers) gate = Gate();
    const int warpgroups = launch_.threads / kWarpgroup;
    block.warpgroup_gates.assign(warpgroups, Gate());
    block.registers.assign(warpgroups, std::min(256, Block::kRegisters / launch_.threads / 8 * 8));
    block.register_pool = std::accumulate(block.registers.begin(), block.registers.end(), 0);
    block.waiting_for_registers.clear();
    block.mbarriers.clear();
    block.warpgroups.clear();
    block.warpgroups.resize(warpgroups);
    block.touched.clear();
    block.alive = launch_.threads;
  }

  Gate& warp_gate(const Where& where);
  Gate& named_gate(int id, int participants, const Where& where);

  // Waits for the gate's participants; the last of them runs `act` and wakes the others.
  template <class Act>
  void meet(Gate& gate, const Where& where, const Act& act) {
    note(where);
    gate.instruction = where.instruction;
    gate.arrived.push_back(running_);
    if (complete(gate)) {
      act();
      gate.arrived.pop_back();  // this thread goes on by itself
      open(gate, [] {});
    } else {
      switch_to_next(threads_[running_].fiber);
    }
  }
  static bool complete(const Gate& gate) { return int(gate.arrived.size() + gate.passed.size()) == gate.participants; }
  template <class Act>
  void open(Gate& gate, const Act& act) {
    act();
    runnable_.insert(runnable_.end(), gate.arrived.begin(), gate.arrived.end());
    gate.arrived.clear();
    gate.passed.clear();
    gate.told.clear();
  }

  void set_running(int thread) {
    running_ = thread;
    rank_ = launch_.cluster == 1 ? 0 : thread / launch_.threads;
  }
  void switch_to_next(Fiber& from) {
    for (;;) {
      const size_t choices = runnable_.size() + deferred_.size();
      if (choices == 0) {
        fault_ = text("block %d: deadlock: ", first_block_) + who_waits_where();
        leave(from);
      }
      const size_t drawn = draw(choices);
      if (drawn >= runnable_.size()) {
        act(drawn - runnable_.size());
        continue;
      }
      set_running(runnable_[drawn]);
      runnable_[drawn] = runnable_.back();
      runnable_.pop_back();
      break;
    }
    ++counters_.switches;
    Fiber& to = threads_[running_].fiber;
    if (&to != &from) switch_fiber(from, to);  // else something that happened meanwhile has woken this thread
  }
  void act(size_t index) {
    const Deferred now = std::move(deferred_[index]);
    deferred_.erase(deferred_.begin() + index);
    set_running(now.thread);
    now.action();
  }
  [[noreturn]] void leave(Fiber& from) {
    switch_fiber(from, main_);
    abort();  // nobody goes back to a fiber that left
  }

  // ---- the end of things, and messages: in report.h
  void finish_thread();
  void check_end_of_thread();
  void check_end_of_block();
  std::string who_waits_where() const;
  std::string describe(const Thread& thread) const;

  const Launch launch_;
  const int count_;  // threads of the cluster; those of a block are neighbours
  GlobalMemory& global_;
  const std::function<void()>& kernel_;
  Clocks clocks_;
  std::deque<Block> blocks_;
  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Gate> warps_;
  Gate cluster_gate_;
  std::vector<int> runnable_;
  std::vector<Deferred> deferred_;
  Fiber main_;
  uint64_t random_;
  int first_block_ = 0, running_ = -1, rank_ = 0, alive_ = 0, leader_ = 0;
  int pauses_ = 0;  // since a thread was last woken
  std::string fault_;
  Counters counters_;
};

inline Machine& machine() { return *Machine::current(); }

[[noreturn]] inline void fail(const Where& where, const std::string& what) { machine().stop(where, what); }

}  // namespace emulator

// A SIMT machine: every CUDA thread of a block is a fiber, which runs until it waits for others. Blocks run one after
// another on each of a few host threads. Which fiber runs next is drawn from a seed.
#pragma once

#include <signal.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

#include "memory.h"

namespace emulator {

constexpr int kWarp = 32;

struct Launch {
  int blocks = 1;
  int threads = kWarp;
  size_t shared_bytes = 0;
  uint64_t seed = 1;
  int host_threads = 1;
};

struct Counters {
  uint64_t switches = 0;           // of fibers
  uint64_t products = 0;           // mma instructions
  uint64_t matrices = 0;           // 8 x 8 matrices read by ldmatrix
  uint64_t matrix_wavefronts = 0;  // passes over the banks they took; without conflicts as many

  void add(const Counters& other) {
    switches += other.switches;
    products += other.products;
    matrices += other.matrices;
    matrix_wavefronts += other.matrix_wavefronts;
  }
};

class Machine {
 public:
  Machine(const Launch& launch, GlobalMemory& global, const std::function<void()>& kernel)
      : launch_(launch),
        global_(global),
        kernel_(kernel),
        clocks_(launch.threads),
        shared_(launch.shared_bytes, clocks_),
        stacks_(launch.threads),
        threads_(launch.threads),
        warps_(launch.threads / kWarp),
        random_(launch.seed * 2654435761u + 88172645463325252u) {}

  // Runs one block to its end; false when it failed, and fault() says how.
  bool run(int block) {
    block_ = block;
    clocks_.reset();
    shared_.reset();
    for (Gate& gate : barriers_) gate.arrived.clear();
    for (Gate& gate : warps_) gate.arrived.clear();
    runnable_.clear();
    for (int t = 0; t < launch_.threads; ++t) {
      threads_[t] = Thread();
      threads_[t].fiber.start(stacks_.bottom(t), Stacks::usable_bytes(t), [] {
        current()->kernel_();
        current()->finish_thread();
      });
      runnable_.push_back(t);
    }
    alive_ = launch_.threads;
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

  int block() const { return block_; }
  int thread() const { return running_; }
  int threads() const { return launch_.threads; }
  size_t shared_bytes() const { return shared_.size(); }
  Counters& count() { return counters_; }

  const unsigned char* read_shared(uint32_t address, uint32_t size, const Where& where) {
    return shared_.read(running_, address, size, note(where));
  }
  unsigned char* write_shared(uint32_t address, uint32_t size, const Where& where) {
    return shared_.write(running_, address, size, note(where));
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
    shared_.start_copy(running_, shared, size, note(where));
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
      unsigned char* to = shared_.land(running_, copy.shared, copy.size);
      if (copy.source == nullptr) {
        memset(to, 0, copy.size);
      } else {
        memcpy(to, copy.source, copy.size);
      }
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + landed);
  }

  // Barrier 0 is the block's; the others have as many participants as each of them says.
  void barrier(int id, int participants, const Where& where) {
    if (id < 0 || id >= kBarriers) fail(where, text("barrier %d of %d", id, kBarriers));
    Gate& gate = barriers_[id];
    if (!gate.arrived.empty() && gate.participants != participants) {
      fail(where, text("barrier %d for %d threads and for %d at once", id, gate.participants, participants));
    }
    gate.participants = participants;
    meet(gate, where, [&] {
      if (participants == launch_.threads) {
        clocks_.join_block();
      } else {
        clocks_.join(gate.arrived);
      }
    });
  }
  void warp_barrier(const Where& where) {
    Gate& gate = warp_gate(where);
    meet(gate, where, [&] { clocks_.join(gate.arrived); });
  }

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

  // Ends the block: records the first fault and leaves the fiber for good.
  [[noreturn]] void stop(const Where& where, const std::string& what) {
    const char* path = strstr(where.site.file, "csrc/");
    fault_ = text("block %d, thread %d (warp %d, lane %d), %s in %s(), %s:%d: ", block_, running_, running_ / kWarp,
                  running_ % kWarp, where.instruction, where.site.function, path == nullptr ? where.site.file : path,
                  where.site.line) +
             what;
    leave(threads_[running_].fiber);
  }
  // A kernel followed a pointer itself: past the functions that translate and check it, or into nowhere.
  [[noreturn]] void stop_at_plain_access(const void* p) {
    const Where last = threads_[running_].last;
    if (stacks_.contains(p)) stop(last, "after this the fiber's stack overflowed");
    std::string what = text("address %p", p);
    if (global_.contains(p)) what = "global memory";
    if (SharedMemory::window().contains(p)) {
      what = text("shared memory, byte %td", static_cast<const unsigned char*>(p) - SharedMemory::window_begin());
    }
    stop(last, "after this a plain load or store touched " + what + ", not through device.cuh or ptx.cuh");
  }
  bool in_kernel() const { return running_ >= 0; }

 private:
  static constexpr int kBarriers = 16;

  struct Copy {
    uint32_t shared, size;
    const unsigned char* source;  // null: zeros
    int group;
  };
  struct Thread {
    Fiber fiber;
    void* operand = nullptr;  // of the collective instruction it waits in
    Where last{"start", Site()};
    bool waiting = false, done = false;
    int groups = 0;  // committed so far
    std::vector<Copy> copies;
  };
  struct Gate {
    int participants = kWarp;
    const char* instruction = nullptr;
    std::vector<int> arrived;
  };

  const Where& note(const Where& where) { return threads_[running_].last = where; }
  uint32_t thread_in_grid() const { return uint32_t(block_) * launch_.threads + running_; }

  Gate& warp_gate(const Where& where) {
    Gate& gate = warps_[running_ / kWarp];
    if (!gate.arrived.empty() && strcmp(gate.instruction, where.instruction) != 0) {
      fail(where, text("the warp diverged: lane %d is at ", gate.arrived[0] % kWarp) + gate.instruction);
    }
    return gate;
  }

  // Waits for the gate's participants; the last of them runs `complete` and wakes the others.
  template <class Complete>
  void meet(Gate& gate, const Where& where, const Complete& complete) {
    note(where);
    gate.instruction = where.instruction;
    gate.arrived.push_back(running_);
    if (int(gate.arrived.size()) == gate.participants) {
      complete();
      for (int t : gate.arrived) threads_[t].waiting = false;
      gate.arrived.pop_back();  // this thread goes on by itself
      runnable_.insert(runnable_.end(), gate.arrived.begin(), gate.arrived.end());
      gate.arrived.clear();
      return;
    }
    Thread& me = threads_[running_];
    me.waiting = true;
    switch_to_next(me.fiber);
  }

  void finish_thread() {
    threads_[running_].done = true;
    if (--alive_ == 0) leave(threads_[running_].fiber);
    switch_to_next(threads_[running_].fiber);
  }
  void switch_to_next(Fiber& from) {
    if (runnable_.empty()) {
      fault_ = text("block %d: deadlock: ", block_) + who_waits_where();
      leave(from);
    }
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    const size_t drawn = (random_ >> 32) * runnable_.size() >> 32;
    running_ = runnable_[drawn];
    runnable_[drawn] = runnable_.back();
    runnable_.pop_back();
    ++counters_.switches;
    switch_fiber(from, threads_[running_].fiber);
  }
  [[noreturn]] void leave(Fiber& from) {
    switch_fiber(from, main_);
    abort();  // nobody goes back to a fiber that left
  }

  std::string who_waits_where() const {
    std::string all;
    for (int begin = 0, end; begin < launch_.threads; begin = end) {
      const std::string state = describe(threads_[begin]);
      for (end = begin + 1; end < launch_.threads && describe(threads_[end]) == state;) ++end;
      all += text("%sthreads %d-%d ", all.empty() ? "" : "; ", begin, end - 1) + state;
    }
    return all;
  }
  static std::string describe(const Thread& thread) {
    if (thread.done) return "have returned";
    const Site& site = thread.last.site;
    const char* path = strstr(site.file, "csrc/");
    return text("wait in %s, called by %s(), %s:%d", thread.last.instruction, site.function,
                path == nullptr ? site.file : path, site.line);
  }

  const Launch launch_;
  GlobalMemory& global_;
  const std::function<void()>& kernel_;
  Clocks clocks_;
  SharedMemory shared_;
  Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Gate> warps_;
  Gate barriers_[kBarriers];
  std::vector<int> runnable_;
  Fiber main_;
  uint64_t random_;
  int block_ = 0, running_ = -1, alive_ = 0;
  std::string fault_;
  Counters counters_;
};

inline Machine& machine() { return *Machine::current(); }

[[noreturn]] inline void fail(const Where& where, const std::string& what) { machine().stop(where, what); }

// While this lives, a bad pointer in a kernel becomes a fault of its launch; elsewhere signals act as before.
class SignalGuard {
 public:
  SignalGuard() {
    struct sigaction action = {};
    action.sa_sigaction = [](int number, siginfo_t* info, void*) {
      if (Machine::current() != nullptr && machine().in_kernel()) machine().stop_at_plain_access(info->si_addr);
      sigaction(number, &previous(), nullptr);
    };
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler leaves by switching fibers
    sigaction(SIGSEGV, &action, &previous());
  }
  ~SignalGuard() { sigaction(SIGSEGV, &previous(), nullptr); }

 private:
  static struct sigaction& previous() {
    static struct sigaction action;
    return action;
  }
};

// Runs a grid. Returns what went wrong first, or an empty string; `counters` are added to.
inline std::string run(const Launch& launch, GlobalMemory& global, const std::function<void()>& kernel,
                       Counters& counters) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  if (launch.threads <= 0 || launch.threads > 1024 || launch.threads % kWarp != 0)
    return "threads: whole warps, <= 1024";
  const SignalGuard signals;
  global.begin_launch();
  std::atomic<int> next{0};
  std::mutex results;
  std::string fault;
  const auto work = [&] {
    std::vector<unsigned char> signal_stack(64 * 1024);
    const stack_t stack = {signal_stack.data(), 0, signal_stack.size()};
    stack_t outer;
    sigaltstack(&stack, &outer);
    Launch mine = launch;
    mine.seed += next;
    Machine here(mine, global, kernel);
    Machine::current() = &here;
    for (int block; (block = next++) < launch.blocks;) {
      if (!here.run(block)) next = launch.blocks;
    }
    Machine::current() = nullptr;
    sigaltstack(&outer, nullptr);
    const std::lock_guard<std::mutex> result(results);
    counters.add(here.counters());
    if (fault.empty()) fault = here.fault();
  };
  std::vector<std::thread> others;
  for (int i = 1; i < std::min(launch.host_threads, launch.blocks); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return fault;
}

}  // namespace emulator

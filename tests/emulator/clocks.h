// Happens-before among all that reads and writes the shared memory of a cluster.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "fault.h"

namespace emulator {

// Each thread counts its own time, a step whenever it tells others what it did. What actor w did at its time c is known
// to thread t if a chain of barriers leads from there to t. Actors are the threads, and agents: things that read or
// write on their own, each of which counts what it does. An mbarrier counts its phases, for the bytes that land in
// them; a warpgroup its products; a thread's TMA stores themselves.
class Clocks {
 public:
  // What a thread has told others of; one entry for each actor.
  using Knowledge = std::vector<uint32_t>;

  Clocks(int threads, int threads_per_block, int agents)
      : count_(threads),
        per_block_(threads_per_block),
        stride_(threads + agents),
        own_(threads),
        fenced_(threads),
        init_fenced_(threads),
        loads_(threads),
        all_(stride_),
        known_(size_t(threads) * stride_) {}

  void reset() {
    std::fill(own_.begin(), own_.end(), 1);
    std::fill(fenced_.begin(), fenced_.end(), 0);
    std::fill(loads_.begin(), loads_.end(), Loads());
    std::fill(init_fenced_.begin(), init_fenced_.end(), 0);
    std::fill(all_.begin(), all_.end(), 0);
    std::fill(known_.begin(), known_.end(), 0);
    agents_.clear();
  }
  int add_agent(std::string name, const Where& where) {
    if (count_ + int(agents_.size()) == stride_) {
      fail(where,
           text("the emulator has room for %d mbarriers, warpgroups and threads that store by TMA", stride_ - count_));
    }
    agents_.push_back(std::move(name));
    return actors() - 1;
  }
  bool is_thread(int w) const { return w < count_; }
  std::string name(int w) const {
    if (!is_thread(w)) return agents_[w - count_];
    if (per_block_ == count_) return text("thread %d", w);
    return text("thread %d of the cluster's block %d", w % per_block_, w / per_block_);
  }

  uint32_t now(int t) const { return own_[t]; }
  bool known(int t, int w, uint32_t clock) const {
    return t == w || clock <= all_[w] || clock <= known_[size_t(t) * stride_ + w];
  }
  void learn(int t, int w, uint32_t clock) {
    uint32_t& known = known_[size_t(t) * stride_ + w];
    known = std::max(known, clock);
  }
  // A barrier of all threads: all now know all.
  void join_all() {
    for (int a = count_; a < actors(); ++a) {
      for (int t = 0; t < count_; ++t) all_[a] = std::max(all_[a], known_[size_t(t) * stride_ + a]);
    }
    for (int t = 0; t < count_; ++t) all_[t] = own_[t]++;
  }
  // A barrier of some threads: each now knows what any of them knew, and what others told.
  void join(const std::vector<int>& threads, const Knowledge& told = {}) {
    Knowledge all = told;
    all.resize(actors());
    for (int t : threads) {
      const uint32_t* row = &known_[size_t(t) * stride_];
      for (int w = 0; w < actors(); ++w) all[w] = std::max(all[w], row[w]);
    }
    for (int t : threads) all[t] = own_[t]++;
    for (int t : threads) std::copy(all.begin(), all.end(), known_.begin() + size_t(t) * stride_);
  }
  void publish(int t, Knowledge& to) {
    to.resize(stride_);
    const uint32_t* row = &known_[size_t(t) * stride_];
    for (int w = 0; w < actors(); ++w) to[w] = std::max(to[w], row[w]);
    to[t] = own_[t]++;
  }
  void acquire(int t, const Knowledge& from) {
    uint32_t* row = &known_[size_t(t) * stride_];
    const int size = std::min(actors(), int(from.size()));
    for (int w = 0; w < size; ++w) row[w] = std::max(row[w], from[w]);
  }

  // Which of a thread's writes asynchronous operations may see, and which of its mbarriers' initialisations.
  void fence(int t) {
    settle_loads(t);
    fenced_[t] = own_[t]++;
  }
  bool fenced(int t, uint32_t clock) const { return clock <= fenced_[t]; }
  // Loads into registers are on their way until the thread calls a fence, or an instruction needs what they bring.
  void start_load(int t) { loads_[t].running = true; }
  void settle_loads(int t) {
    if (!loads_[t].running) return;
    loads_[t].running = false;
    loads_[t].settled.push_back(own_[t]++);
  }
  // Whether thread t knows that a load by w has settled.
  bool load_settled(int t, int w, uint32_t clock) const {
    const std::vector<uint32_t>& settled = loads_[w].settled;
    const auto first = std::lower_bound(settled.begin(), settled.end(), clock);
    return first != settled.end() && known(t, w, *first);
  }
  void fence_init(int t) { init_fenced_[t] = own_[t]++; }
  bool init_fenced(int t, uint32_t clock) const { return clock <= init_fenced_[t]; }

 private:
  int actors() const { return count_ + int(agents_.size()); }

  int count_, per_block_, stride_;
  struct Loads {
    bool running = false;
    std::vector<uint32_t> settled;  // when, ascending
  };

  std::vector<uint32_t> own_, fenced_, init_fenced_;
  std::vector<Loads> loads_;
  Knowledge all_, known_;  // what everybody knows; what each thread knows besides
  std::vector<std::string> agents_;
};

}  // namespace emulator

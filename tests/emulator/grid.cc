// Runs the clusters of a grid, on a few host threads.
#include "grid.h"

#include <signal.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "machine.h"

namespace emulator {

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

// Why no GPU would take the launch; empty if one would.
static std::string why_refused(const Launch& launch) {
  if (launch.threads <= 0 || launch.threads > 1024 || launch.threads % kWarp != 0) {
    return text("%d threads in a block: whole warps are needed, and at most 1024 threads", launch.threads);
  }
  if (launch.cluster < 1 || launch.cluster > kLargestCluster || launch.blocks % launch.cluster != 0) {
    return text("%d blocks in clusters of %d", launch.blocks, launch.cluster);
  }
  constexpr size_t kSharedBytes = 232448;  // of a block, on the largest device there is
  if (launch.shared_bytes > kSharedBytes) {
    return text("%zu bytes of shared memory in a block; there are %zu", launch.shared_bytes, kSharedBytes);
  }
  return "";
}

// Inline, so that it is one for all libraries of the process, as what they do to its signals is.
inline std::mutex& one_launch() {
  static std::mutex mutex;
  return mutex;
}

std::string run(const Launch& launch, GlobalMemory& global, const std::function<void()>& kernel, Counters& counters) {
  const std::lock_guard<std::mutex> lock(one_launch());
  if (const std::string why = why_refused(launch); !why.empty()) return why;
  const SignalGuard signals;
  global.begin_launch();
  const int clusters = launch.blocks / launch.cluster;
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
    for (int cluster; (cluster = next++) < clusters;) {
      if (!here.run(cluster)) next = clusters;
    }
    Machine::current() = nullptr;
    sigaltstack(&outer, nullptr);
    const std::lock_guard<std::mutex> result(results);
    counters.add(here.counters());
    if (fault.empty()) fault = here.fault();
  };
  std::vector<std::thread> others;
  for (int i = 1; i < std::min(launch.host_threads, clusters); ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return fault;
}

}  // namespace emulator

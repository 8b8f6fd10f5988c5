// What Python sees of the machine, the same in every library that emulator.py builds.
#pragma once

#include <cstdio>

#include "grid.h"

// How to run a call, and what came of it. Mirrored in emulator.py.
struct Session {
  uint64_t seed;
  int64_t host_threads;
  int64_t multiprocessors;
  int64_t together;  // blocks of a grid no larger than a cluster may be run as one, in turn
  emulator::Counters counters;
  char fault[4096];
};

namespace emulator {

// One kernel of a call; nothing happens after a fault.
template <class Kernel>
void launch(Session& session, GlobalMemory& memory, int blocks, int threads, size_t shared_bytes, const Kernel& kernel,
            int cluster = 1) {
  if (session.fault[0] != '\0') return;
  if (session.together != 0 && cluster == 1 && blocks <= kLargestCluster) cluster = blocks;
  const Launch launch = {blocks, threads, shared_bytes, cluster, session.seed, int(session.host_threads)};
  const std::string fault = run(launch, memory, kernel, session.counters);
  snprintf(session.fault, sizeof(session.fault), "%s", fault.c_str());
}

}  // namespace emulator

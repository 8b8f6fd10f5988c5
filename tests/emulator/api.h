// What Python sees of the machine, the same in every library that emulator.py builds.
#pragma once

#include "grid.h"

extern "C" {

// How to run a call, and what came of it. Mirrored in emulator.py.
struct Session {
  uint64_t seed;
  int64_t host_threads;
  int64_t multiprocessors;
  emulator::Counters counters;
  char fault[4096];
};

inline __attribute__((used)) emulator::GlobalMemory* memory_create() { return new emulator::GlobalMemory(); }
inline __attribute__((used)) void memory_destroy(emulator::GlobalMemory* memory) { delete memory; }
inline __attribute__((used)) void* memory_allocate(emulator::GlobalMemory* memory, const char* name, void* host,
                                                   uint64_t bytes, int kind) {
  return memory->allocate(name, host, bytes, static_cast<emulator::GlobalMemory::Kind>(kind));
}
inline __attribute__((used)) void memory_check_outputs(const emulator::GlobalMemory* memory, Session* session) {
  snprintf(session->fault, sizeof(session->fault), "%s", memory->unwritten_output().c_str());
}
}

namespace emulator {

// One kernel of a call; nothing happens after a fault.
template <class Kernel>
void launch(Session& session, GlobalMemory& memory, int blocks, int threads, size_t shared_bytes, const Kernel& kernel,
            int cluster = 1) {
  if (session.fault[0] != '\0') return;
  const Launch launch = {blocks, threads, shared_bytes, cluster, session.seed, int(session.host_threads)};
  const std::string fault = run(launch, memory, kernel, session.counters);
  snprintf(session.fault, sizeof(session.fault), "%s", fault.c_str());
}

}  // namespace emulator

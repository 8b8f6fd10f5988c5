// Arrays as Python registers them.
#include "api.h"

extern "C" emulator::GlobalMemory* memory_create() { return new emulator::GlobalMemory(); }
extern "C" void memory_destroy(emulator::GlobalMemory* memory) { delete memory; }
extern "C" void* memory_allocate(emulator::GlobalMemory* memory, const char* name, void* host, uint64_t bytes,
                                 int kind) {
  return memory->allocate(name, host, bytes, static_cast<emulator::GlobalMemory::Kind>(kind));
}
extern "C" void memory_check_outputs(const emulator::GlobalMemory* memory, Session* session) {
  snprintf(session->fault, sizeof(session->fault), "%s", memory->unwritten_output().c_str());
}

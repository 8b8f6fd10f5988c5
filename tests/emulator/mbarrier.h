// mbarriers: who arrives, what bytes are to come, who waits.
#pragma once

#include "machine.h"

namespace emulator {

inline int offset_in_block(uint32_t address) { return int(address - SharedMemory::kBase); }

// `address` is local to the block.
void mbarrier_init(uint32_t address, int arrivals, const Where& where);
void mbarrier_arrive(uint32_t address, int bytes, const Where& where);
void mbarrier_arrive_remote(uint32_t address, int rank, const Where& where);
// True when the phase has ended; false only if this may not sleep until it has.
bool mbarrier_wait(uint32_t address, uint32_t parity, bool may_sleep, const Where& where);

// ---- for what moves bytes

// The mbarrier at a local address of a block; the running thread must know that it was initialised. `fenced`: so that
// others than the block's threads see it.
Mbarrier& find_mbarrier(Machine::Block& block, uint32_t address, bool fenced, const Where& where);
// From outside the block: somebody inside must know that nothing more comes before the block ends.
void touch_block(Machine::Block& block, int actor, uint32_t clock, const Where& where);
// The time at which bytes that land now do so, in the mbarrier's clock.
inline uint32_t landing_clock(const Mbarrier& b) { return uint32_t(b.phases) + 1; }
void complete_bytes(Mbarrier& b, int bytes, const Where& where);

}  // namespace emulator

// Products of warpgroups: issued by 128 threads, carried out when one of them waits.
#pragma once

#include <cstdint>

#include "async.h"
#include "fault.h"

namespace emulator {

void fence_products(const Where& where);
// `d` and `a` are registers; 2 x n / 4 and 4 of them.
void issue_product(const ProductForm& form, float* d, const uint32_t* a, const Where& where);
void commit_products(const Where& where);
void wait_for_products(int pending, const Where& where);

// setmaxnreg: all of a warpgroup get another number of registers, which others must have given back.
void set_registers(int count, bool grow, const Where& where);

}  // namespace emulator

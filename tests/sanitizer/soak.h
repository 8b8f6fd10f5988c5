// Random calls on two streams at once, for as long as wanted.
#pragma once

#include <cstdint>
#include <string>

#include "attention.h"

namespace sanitizer {

// The exit status: 0 if all was well. `bug`: empty, or what to plant, of hang, flip, flip_gradient, wrong_scale and
// wrong_gradient. A call that does not end, and an error of the device, end the process.
int soak(double seconds, uint64_t seed, const std::string& bug, const jfa::Device& device);

}  // namespace sanitizer

// Runs the clusters of a grid, on a few host threads.
#pragma once

#include <functional>
#include <string>

#include "global.h"
#include "settings.h"

namespace emulator {

constexpr int kLargestCluster = 8;

// Returns what went wrong first, or an empty string; `counters` are added to.
std::string run(const Launch& launch, GlobalMemory& global, const std::function<void()>& kernel, Counters& counters);

}  // namespace emulator

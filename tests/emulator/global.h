// The device's memory as kernels see it. They hold addresses with nothing behind them (Reservation); the models of the
// memory instructions translate them here, and everything forbidden ends in fail().
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "fault.h"
#include "fiber.h"

namespace emulator {

// The arrays a kernel may touch. Only those, at addresses far apart, aligned to 16 bytes and to nothing more: all that
// XLA promises of the buffers it passes.
class GlobalMemory {
 public:
  enum class Kind : int { kInput, kOutput, kScratch };

  // Returns the address kernels are to see. Inputs are full and may not be written; outputs and scratch begin
  // unwritten.
  void* allocate(const char* name, void* host, size_t bytes, Kind kind) {
    if (next_ + bytes + kGap > window_.size()) throw std::bad_alloc();
    Allocation a{name, window_.begin() + next_ + 16, static_cast<unsigned char*>(host), bytes, kind, {}};
    if (kind != Kind::kInput) a.writers.assign((bytes + kGranule - 1) / kGranule, kUnwritten);
    next_ = (next_ + bytes + kGap) / kGap * kGap + kGap;
    allocations_.push_back(std::move(a));
    return allocations_.back().address;
  }
  bool contains(const void* p) const { return window_.contains(p); }

  // What an earlier kernel wrote, a later one on the same stream may read.
  void begin_launch() {
    for (Allocation& a : allocations_) {
      for (uint32_t& w : a.writers) w = w == kUnwritten ? kUnwritten : kEarlier;
    }
  }
  // False when the bytes do not lie in one array.
  bool set(void* p, int byte, size_t bytes) {
    for (Allocation& a : allocations_) {
      if (p < a.address || p >= a.address + a.bytes || bytes > a.bytes - offset(a, p)) continue;
      memset(host(a, p), byte, bytes);
      for (uint32_t& writer : writers(a, p, bytes)) writer = kEarlier;
      return true;
    }
    return false;
  }
  // The first output of which a kernel has left a byte unwritten, or an empty string.
  std::string unwritten_output() const {
    for (const Allocation& a : allocations_) {
      const auto hole = std::find(a.writers.begin(), a.writers.end(), kUnwritten);
      if (a.kind == Kind::kOutput && hole != a.writers.end()) {
        return text("output %s was never written at byte %zu of %zu", a.name.c_str(),
                    size_t(hole - a.writers.begin()) * kGranule, a.bytes);
      }
    }
    return "";
  }

  // `thread` is unique in the grid.
  const unsigned char* read(uint32_t thread, const void* p, size_t size, const Where& where) {
    return read_bytes(thread, p, size, size, where);
  }
  unsigned char* write(uint32_t thread, void* p, size_t size, const Where& where) {
    return write_bytes(thread, p, size, size, where);
  }
  // The same of any number of bytes, as what moves boxes does.
  const unsigned char* read_bytes(uint32_t thread, const void* p, size_t size, size_t alignment, const Where& where) {
    Allocation& a = find(p, size, alignment, where);
    for (uint32_t& writer : writers(a, p, size)) {
      const uint32_t w = __atomic_load_n(&writer, __ATOMIC_RELAXED);
      if (w == kUnwritten) fail(where, "reads global memory that nobody has written, " + place(a, p, size));
      if (w != kEarlier && w != thread) {
        fail(where, "reads global memory that another thread of this kernel writes, " + place(a, p, size));
      }
    }
    return host(a, p);
  }
  unsigned char* write_bytes(uint32_t thread, void* p, size_t size, size_t alignment, const Where& where) {
    Allocation& a = find_writable(p, size, alignment, where);
    for (uint32_t& writer : writers(a, p, size)) {
      const uint32_t w = __atomic_exchange_n(&writer, thread, __ATOMIC_RELAXED);
      if (w != kUnwritten && w != kEarlier && w != thread) {
        fail(where, "two threads of this kernel write " + place(a, p, size));
      }
    }
    return host(a, p);
  }
  unsigned char* add(void* p, size_t size, const Where& where) {
    Allocation& a = find_writable(p, size, size, where);
    for (uint32_t& writer : writers(a, p, size)) {
      const uint32_t w = __atomic_exchange_n(&writer, kAdded, __ATOMIC_RELAXED);
      if (w == kUnwritten) fail(where, "adds to global memory that nobody has set, " + place(a, p, size));
      if (w != kEarlier && w != kAdded) {
        fail(where, "adds to what another thread of this kernel stores, " + place(a, p, size));
      }
    }
    return host(a, p);
  }

 private:
  static constexpr size_t kGap = size_t(1) << 22;
  static constexpr size_t kGranule = 2;  // bytes that have one writer: half precision elements, neighbours may differ
  static constexpr uint32_t kUnwritten = 0xffffffff, kEarlier = 0xfffffffe, kAdded = 0xfffffffd;

  struct Allocation {
    std::string name;
    unsigned char *address, *host;
    size_t bytes;
    Kind kind;
    std::vector<uint32_t> writers;  // of each granule; empty for an input
  };
  struct Writers {
    uint32_t *first, *last;
    uint32_t* begin() const { return first; }
    uint32_t* end() const { return last; }
  };

  static size_t offset(const Allocation& a, const void* p) { return static_cast<const unsigned char*>(p) - a.address; }
  static unsigned char* host(const Allocation& a, const void* p) { return a.host + offset(a, p); }
  static Writers writers(Allocation& a, const void* p, size_t size) {
    if (a.writers.empty()) return {nullptr, nullptr};
    uint32_t* first = a.writers.data() + offset(a, p) / kGranule;
    return {first, first + (size + kGranule - 1) / kGranule};
  }
  static std::string place(const Allocation& a, const void* p, size_t size) {
    return text("bytes [%zu, %zu) of %s", offset(a, p), offset(a, p) + size, a.name.c_str());
  }
  Allocation& find(const void* p, size_t size, size_t alignment, const Where& where) {
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail(where, text("misaligned global address %p", p));
    for (Allocation& a : allocations_) {
      if (p >= a.address && p < a.address + a.bytes && offset(a, p) + size <= a.bytes) return a;
    }
    fail(where, "out of bounds of global memory: " + nearest(p, size));
  }
  Allocation& find_writable(const void* p, size_t size, size_t alignment, const Where& where) {
    Allocation& a = find(p, size, alignment, where);
    if (a.kind == Kind::kInput) fail(where, "writes to the input, " + place(a, p, size));
    return a;
  }
  std::string nearest(const void* p, size_t size) const {
    for (const Allocation& a : allocations_) {
      const ptrdiff_t at = static_cast<const unsigned char*>(p) - a.address;
      if (at > -ptrdiff_t(kGap / 2) && at < ptrdiff_t(a.bytes + kGap / 2)) {
        return text("bytes [%td, %td) of %s, which has %zu", at, at + ptrdiff_t(size), a.name.c_str(), a.bytes);
      }
    }
    return text("%zu bytes at %p, near no array", size, p);
  }

  Reservation window_{size_t(1) << 34};
  size_t next_ = 1 << 22;
  std::vector<Allocation> allocations_;
};

}  // namespace emulator

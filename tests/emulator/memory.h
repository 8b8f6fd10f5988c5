// What kernels may read and write, and who did. Kernels hold addresses with nothing behind them (Reservation); the
// models of the memory instructions translate them here, and everything forbidden ends in fail().
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "fiber.h"

namespace emulator {

// Where the kernel's source asks for something: a defaulted argument of every model.
struct Site {
  const char* file;
  int line;
  const char* function;
  constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                 const char* function = __builtin_FUNCTION())
      : file(file), line(line), function(function) {}
};

__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

struct Where {
  const char* instruction;
  Site site;
};

// Ends the launch with a message that says who, where and what; defined by the machine.
[[noreturn]] void fail(const Where& where, const std::string& what);

// Happens-before among the threads of a block. Each thread counts its own time, a step at each barrier it passes;
// what thread w did at its time c is known to thread t if a chain of barriers leads from there to t.
class Clocks {
 public:
  explicit Clocks(int threads) : count_(threads), own_(threads), block_(threads), known_(size_t(threads) * threads) {}

  void reset() {
    std::fill(own_.begin(), own_.end(), 1);
    std::fill(block_.begin(), block_.end(), 0);
    std::fill(known_.begin(), known_.end(), 0);
  }
  uint32_t now(int t) const { return own_[t]; }
  bool known(int t, int w, uint32_t clock) const {
    return t == w || clock <= block_[w] || clock <= known_[size_t(t) * count_ + w];
  }
  // A barrier of the whole block: all now know all.
  void join_block() {
    for (int t = 0; t < count_; ++t) block_[t] = own_[t]++;
  }
  // A barrier of some threads: each now knows what any of them knew.
  void join(const std::vector<int>& threads) {
    std::vector<uint32_t> all(count_);
    for (int t : threads) {
      const uint32_t* row = &known_[size_t(t) * count_];
      for (int w = 0; w < count_; ++w) all[w] = std::max(all[w], row[w]);
    }
    for (int t : threads) all[t] = own_[t]++;
    for (int t : threads) std::copy(all.begin(), all.end(), known_.begin() + size_t(t) * count_);
  }

 private:
  int count_;
  std::vector<uint32_t> own_, block_, known_;
};

// The shared memory of one block, with for each word who wrote and who read it last.
class SharedMemory {
 public:
  static constexpr uint32_t kBase = 1024;  // the address of the first byte: kernels must not assume 0
  static constexpr int kWord = 4;

  SharedMemory(size_t bytes, Clocks& clocks) : bytes_(bytes + 16), words_(ceil_words(bytes)), clocks_(clocks) {}

  // What kernels see as their shared memory.
  static const Reservation& window() {
    static const Reservation window(size_t(1) << 20);
    return window;
  }
  static unsigned char* window_begin() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(window().begin()) + 1023) & ~uintptr_t(1023));
  }
  size_t size() const { return bytes_.size() - 16; }

  void reset() {
    std::fill(bytes_.begin(), bytes_.end(), 0xff);  // NaN in every element type
    std::fill(words_.begin(), words_.end(), Word());
  }

  const unsigned char* read(int t, uint32_t address, uint32_t size, const Where& where) {
    check_place(address, size, where);
    for (Word& word : words(address, size)) {
      if (word.state == State::kUnwritten) {
        fail(where, "reads shared memory that nobody has written, " + place(address, size));
      }
      check_after_write(word, t, address, size, where);
      word.reader = t;
      word.read_clock = clocks_.now(t);
    }
    return at(address);
  }
  unsigned char* write(int t, uint32_t address, uint32_t size, const Where& where) {
    check_place(address, size, where);
    for (Word& word : words(address, size)) {
      check_free(word, t, address, size, where);
      word = {State::kWritten, uint16_t(t), uint16_t(t), clocks_.now(t), 0};
    }
    return at(address);
  }
  // An asynchronous write by thread t: from here until land() nobody may touch the bytes.
  void start_copy(int t, uint32_t address, uint32_t size, const Where& where) {
    check_place(address, size, where);
    for (Word& word : words(address, size)) {
      check_free(word, t, address, size, where);
      word = {State::kInFlight, uint16_t(t), uint16_t(t), clocks_.now(t), 0};
    }
  }
  unsigned char* land(int t, uint32_t address, uint32_t size) {
    for (Word& word : words(address, size)) word = {State::kWritten, uint16_t(t), uint16_t(t), clocks_.now(t), 0};
    return at(address);
  }

 private:
  enum class State : uint16_t { kUnwritten, kInFlight, kWritten };
  struct Word {
    State state = State::kUnwritten;
    uint16_t writer = 0, reader = 0;
    uint32_t write_clock = 0, read_clock = 0;
  };
  struct Words {
    Word *first, *last;
    Word* begin() const { return first; }
    Word* end() const { return last; }
  };

  static size_t ceil_words(size_t bytes) { return (bytes + kWord - 1) / kWord; }
  static std::string place(uint32_t address, uint32_t size) {
    return text("bytes [%d, %d)", int(address - kBase), int(address - kBase + size));
  }
  unsigned char* at(uint32_t address) { return bytes_.data() + (address - kBase); }
  Words words(uint32_t address, uint32_t size) {
    Word* first = words_.data() + (address - kBase) / kWord;
    return {first, first + size / kWord};
  }
  void check_place(uint32_t address, uint32_t size, const Where& where) const {
    if (address % size != 0) {
      fail(where, "misaligned shared address: " + place(address, size) + text(" need a multiple of %u", size));
    }
    if (address < kBase || address - kBase + size > this->size()) {
      fail(where, "out of bounds of shared memory: " + place(address, size) + text(" of %zu", this->size()));
    }
  }
  void check_after_write(const Word& word, int t, uint32_t address, uint32_t size, const Where& where) const {
    if (word.state == State::kInFlight) {
      fail(where, text("touches shared memory while a copy of thread %d is in flight to it, ", word.writer) +
                      place(address, size) + ": a copy_async_wait is missing or too late");
    }
    if (word.state == State::kWritten && !clocks_.known(t, word.writer, word.write_clock)) {
      fail(where, text("races with a write of thread %d to shared memory, ", word.writer) + place(address, size) +
                      ": no barrier lies between");
    }
  }
  void check_free(const Word& word, int t, uint32_t address, uint32_t size, const Where& where) const {
    check_after_write(word, t, address, size, where);
    if (word.read_clock != 0 && !clocks_.known(t, word.reader, word.read_clock)) {
      fail(where, text("overwrites shared memory that thread %d has read, ", word.reader) + place(address, size) +
                      ": no barrier lies between");
    }
  }

  std::vector<unsigned char> bytes_;
  std::vector<Word> words_;
  Clocks& clocks_;
};

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
    Allocation& a = find(p, size, where);
    for (uint32_t& writer : writers(a, p, size)) {
      const uint32_t w = __atomic_load_n(&writer, __ATOMIC_RELAXED);
      if (w == kUnwritten) fail(where, "reads global memory that nobody has written, " + place(a, p, size));
      if (w != kEarlier && w != thread) {
        fail(where, "reads global memory that another thread of this kernel writes, " + place(a, p, size));
      }
    }
    return host(a, p);
  }
  unsigned char* write(uint32_t thread, void* p, size_t size, const Where& where) {
    Allocation& a = find_writable(p, size, where);
    for (uint32_t& writer : writers(a, p, size)) {
      const uint32_t w = __atomic_exchange_n(&writer, thread, __ATOMIC_RELAXED);
      if (w != kUnwritten && w != kEarlier && w != thread) {
        fail(where, "two threads of this kernel write " + place(a, p, size));
      }
    }
    return host(a, p);
  }
  unsigned char* add(void* p, size_t size, const Where& where) {
    Allocation& a = find_writable(p, size, where);
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
  Allocation& find(const void* p, size_t size, const Where& where) {
    if (reinterpret_cast<uintptr_t>(p) % size != 0) fail(where, text("misaligned global address %p", p));
    for (Allocation& a : allocations_) {
      if (p >= a.address && p < a.address + a.bytes && offset(a, p) + size <= a.bytes) return a;
    }
    fail(where, "out of bounds of global memory: " + nearest(p, size));
  }
  Allocation& find_writable(const void* p, size_t size, const Where& where) {
    Allocation& a = find(p, size, where);
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

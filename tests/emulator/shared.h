// The shared memory of one block, with for each word who wrote and who read it last.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "clocks.h"
#include "fault.h"
#include "fiber.h"

namespace emulator {

class SharedMemory {
 public:
  static constexpr uint32_t kBase = 1024;  // the address of the first byte: kernels must not assume 0
  static constexpr int kWord = 4;
  static constexpr int kChunk = 16;  // what asynchronous operations move at once

  SharedMemory(size_t bytes, Clocks& clocks)
      : bytes_(bytes + 16), words_((bytes + kWord - 1) / kWord), readers_(bytes / kChunk + 1), clocks_(clocks) {}

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
    if (read_asynchronously_) std::fill(readers_.begin(), readers_.end(), Readers());
    read_asynchronously_ = false;
  }

  const unsigned char* read(int t, uint32_t address, uint32_t size, const Where& where) {
    check_place(address, size, where);
    for (Word& word : words(address, size)) {
      if (word.state == State::kUnwritten) fail_unwritten(address, size, where);
      check_after_write(word, t, address, size, where);
      word.reader = t;
      word.read_clock = clocks_.now(t);
    }
    clocks_.start_load(t);
    return at(address);
  }
  unsigned char* write(int t, uint32_t address, uint32_t size, const Where& where) {
    check_place(address, size, where);
    check_read(t, address, size, where);
    for (Word& word : words(address, size)) {
      check_free(word, t, address, size, where);
      word = {State::kWritten, uint16_t(t), uint16_t(t), clocks_.now(t), 0};
    }
    return at(address);
  }
  // An asynchronous write by thread t (cp.async): from here until land() nobody may touch the bytes.
  void start_copy(int t, uint32_t address, uint32_t size, const Where& where) {
    check_place(address, size, where);
    check_read(t, address, size, where);
    for (Word& word : words(address, size)) {
      check_free(word, t, address, size, where);
      word = {State::kInFlight, uint16_t(t), uint16_t(t), clocks_.now(t), 0};
    }
  }
  unsigned char* land(int t, uint32_t address, uint32_t size) { return land(t, clocks_.now(t), address, size); }

  // A write that thread t starts and that others do: bytes for an agent's phase, by the asynchronous proxy.
  void start_transfer(int t, int agent, uint32_t address, uint32_t size, const Where& where) {
    check_place(address, size, where);
    check_read(t, address, size, where);
    for (Word& word : words(address, size)) {
      check_free(word, t, address, size, where);
      check_fenced(word, address, size, where);
      if (size == kChunk) check_load_settled(word, t, address, size, where);  // not st.async
      word = {State::kInFlight, uint16_t(agent), uint16_t(agent), 0, 0};
    }
  }
  unsigned char* land(int actor, uint32_t clock, uint32_t address, uint32_t size) {
    for (Word& word : words(address, size)) word = {State::kWritten, uint16_t(actor), uint16_t(actor), clock, 0};
    return at(address);
  }

  // An asynchronous read by `count` threads at once, the agent's `clock`-th: until somebody knows that the agent has
  // come so far, nobody may write the bytes.
  struct AsyncRead {
    int first, count;
    int agent;
    uint32_t clock;
    int checked_writer = -1;  // the last one found to be known to all the threads
    uint32_t checked_clock = 0;
  };
  const unsigned char* read_async(AsyncRead& read, uint32_t address, const Where& where) {
    check_place(address, kChunk, where);
    for (const Word& word : words(address, kChunk)) {
      if (word.state == State::kWritten && word.writer == read.checked_writer &&
          word.write_clock == read.checked_clock) {
        continue;
      }
      if (word.state == State::kUnwritten) fail_unwritten(address, kChunk, where);
      for (int t = read.first; t < read.first + read.count; ++t) {
        check_after_write(word, t, address, kChunk, where);
      }
      check_fenced(word, address, kChunk, where);
      read.checked_writer = word.writer;
      read.checked_clock = word.write_clock;
    }
    read_asynchronously_ = true;
    readers(address).add(read.agent, read.clock);
    return at(address);
  }
  // Bytes as they are: of reads that read_async() has announced.
  const unsigned char* peek(uint32_t address) const { return bytes_.data() + (address - kBase); }

  // 8 bytes that only the functions of mbarriers may touch from here on.
  void make_mbarrier(int t, uint32_t address, const Where& where) {
    write(t, address, 8, where);
    for (Word& word : words(address, 8)) word.state = State::kMbarrier;
  }
  static std::string place(uint32_t address, uint32_t size) {
    return text("bytes [%d, %d)", int(address - kBase), int(address - kBase + size));
  }

 private:
  enum class State : uint16_t { kUnwritten, kInFlight, kWritten, kMbarrier };
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
  // Agents that read a chunk since it was written. When there are too many the first are forgotten.
  struct Readers {
    static constexpr int kCount = 4;
    uint16_t agent[kCount] = {};  // 0: none; thread 0 is no agent
    uint32_t clock[kCount] = {};

    void add(int reader, uint32_t time) {
      int i = 0;
      while (i < kCount - 1 && agent[i] != 0 && agent[i] != reader) ++i;
      agent[i] = uint16_t(reader);
      clock[i] = time;
    }
  };

  unsigned char* at(uint32_t address) { return bytes_.data() + (address - kBase); }
  Words words(uint32_t address, uint32_t size) {
    Word* first = words_.data() + (address - kBase) / kWord;
    return {first, first + size / kWord};
  }
  Readers& readers(uint32_t address) { return readers_[(address - kBase) / kChunk]; }

  void check_place(uint32_t address, uint32_t size, const Where& where) const {
    if (address % size != 0) {
      fail(where, "misaligned shared address: " + place(address, size) + text(" need a multiple of %u", size));
    }
    if (address < kBase || size_t(address - kBase) + size > this->size()) {
      fail(where, "out of bounds of shared memory: " + place(address, size) + text(" of %zu", this->size()));
    }
  }
  [[noreturn]] void fail_unwritten(uint32_t address, uint32_t size, const Where& where) const {
    fail(where, "reads shared memory that nobody has written, " + place(address, size));
  }
  void check_after_write(const Word& word, int t, uint32_t address, uint32_t size, const Where& where) const {
    if (word.state == State::kWritten) {
      if (clocks_.known(t, word.writer, word.write_clock)) return;
      fail(where, "races with a write of " + clocks_.name(word.writer) + " to shared memory, " + place(address, size) +
                      ": no barrier lies between");
    }
    if (word.state == State::kInFlight) fail_in_flight(word, address, size, where);
    if (word.state == State::kMbarrier) fail(where, "touches the mbarrier in " + place(address, size));
  }
  [[noreturn]] void fail_in_flight(const Word& word, uint32_t address, uint32_t size, const Where& where) const {
    if (clocks_.is_thread(word.writer)) {
      fail(where, "touches shared memory while a copy of " + clocks_.name(word.writer) + " is in flight to it, " +
                      place(address, size) + ": a copy_async_wait is missing or too late");
    }
    fail(where, "touches shared memory while bytes for " + clocks_.name(word.writer) + " are in flight to it, " +
                    place(address, size));
  }
  void check_free(const Word& word, int t, uint32_t address, uint32_t size, const Where& where) const {
    check_after_write(word, t, address, size, where);
    if (word.read_clock != 0 && !clocks_.known(t, word.reader, word.read_clock)) {
      fail(where, "overwrites shared memory that " + clocks_.name(word.reader) + " has read, " + place(address, size) +
                      ": no barrier lies between");
    }
  }
  // All bytes lie in one chunk.
  void check_read(int t, uint32_t address, uint32_t size, const Where& where) {
    if (!read_asynchronously_) return;
    Readers& all = readers(address);
    for (int i = 0; i < Readers::kCount && all.agent[i] != 0; ++i) {
      if (clocks_.known(t, all.agent[i], all.clock[i])) continue;
      fail(where, "overwrites shared memory that " + clocks_.name(all.agent[i]) + " may still read, " +
                      place(address, size) + ": nobody who waited for them told this thread");
    }
    if (size == kChunk) all = Readers();  // who knows of this write knows of those reads
  }
  void check_fenced(const Word& word, uint32_t address, uint32_t size, const Where& where) const {
    if (word.state != State::kWritten || !clocks_.is_thread(word.writer)) return;
    if (clocks_.fenced(word.writer, word.write_clock)) return;
    fail(where,
         clocks_.name(word.writer) + " has called no fence_async_shared after its write to " + place(address, size));
  }

  // An arrival counts although loads before it are still on their way, on an H200 too.
  void check_load_settled(const Word& word, int t, uint32_t address, uint32_t size, const Where& where) const {
    if (word.read_clock == 0 || clocks_.load_settled(t, word.reader, word.read_clock)) return;
    fail(where, clocks_.name(word.reader) +
                    " has neither used what it read nor called fence_async_shared after its read of " +
                    place(address, size));
  }

  std::vector<unsigned char> bytes_;
  std::vector<Word> words_;
  std::vector<Readers> readers_;  // of each chunk
  bool read_asynchronously_ = false;
  Clocks& clocks_;
};

}  // namespace emulator

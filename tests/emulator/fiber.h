// Fibers: stacks that take turns on one host thread. A kernel's thread changes place with another some hundred thousand
// times per case, and swapcontext() makes a system call each time; hence the few instructions of assembly on x86-64.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(JFA_EMULATOR_UCONTEXT)
// Saves the registers a function must preserve on the running stack, and takes those of the other stack.
asm(R"(
.text
.p2align 4
.type jfa_emulator_switch, @function
jfa_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size jfa_emulator_switch, . - jfa_emulator_switch
)");
extern "C" __attribute__((visibility("hidden"))) void jfa_emulator_switch(void** from, void* to);

namespace emulator {

struct Fiber {
  void* stack_pointer = nullptr;

  // `entry` must never return.
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
    *--top = nullptr;  // a function is entered with its stack 8 bytes off a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
};
inline void switch_fiber(Fiber& from, Fiber& to) { jfa_emulator_switch(&from.stack_pointer, to.stack_pointer); }

}  // namespace emulator
#else
#include <ucontext.h>

namespace emulator {

struct Fiber {
  ucontext_t context;

  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

}  // namespace emulator
#endif

namespace emulator {

// Addresses with nothing behind them: touching one is a signal, never a silent access to something else.
class Reservation {
 public:
  explicit Reservation(size_t bytes)
      : bytes_(bytes),
        begin_(static_cast<unsigned char*>(
            mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (begin_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Reservation() { munmap(begin_, bytes_); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  unsigned char* begin() const { return begin_; }
  size_t size() const { return bytes_; }
  bool contains(const void* p) const { return p >= begin_ && p < begin_ + bytes_; }

 private:
  size_t bytes_;
  unsigned char* begin_;
};

// One stack for each thread of a block, a page without access below each of them.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024;
  static constexpr size_t kGuardBytes = 64 * 1024;  // the largest page in use

  explicit Stacks(int count) : memory_(count * (kBytes + kGuardBytes)) {
    for (int i = 0; i < count; ++i) {
      if (mprotect(bottom(i), kBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    }
  }
  unsigned char* bottom(int i) const { return memory_.begin() + i * (kBytes + kGuardBytes) + kGuardBytes; }
  // Stacks that all began at the same distance from a page would compete for the same few lines of the cache.
  static size_t usable_bytes(int i) { return kBytes - i % 64 * 320; }
  bool contains(const void* p) const { return memory_.contains(p); }

 private:
  Reservation memory_;
};

}  // namespace emulator

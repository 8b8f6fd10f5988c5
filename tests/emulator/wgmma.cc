// Products of warpgroups: issued by 128 threads, carried out when one of them waits.
#include "wgmma.h"

#include "elements.h"
#include "machine.h"
#include "tma.h"

namespace emulator {

constexpr int kProductRows = 64;

// Where the elements of an operand lie, as its descriptor says (PTX ISA 9.0, 9.7.15.5.1).
class Descriptor {
 public:
  Descriptor(uint64_t bits, const Where& where)
      : start_(uint32_t(bits & 0x3fff) << 4),
        leading_(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride_(uint32_t(bits >> 32 & 0x3fff) << 4) {
    constexpr uint64_t kUnused = uint64_t(3) << 14 | uint64_t(3) << 30 | uint64_t(7) << 46 | uint64_t(0x3ff) << 52;
    if (bits & kUnused) fail(where, text("bits of the descriptor %016llx that mean nothing are set", (long long)bits));
    if (bits >> 49 & 7) fail(where, "the emulator's matrices start where the swizzle's pattern does: base offset 0");
    constexpr int kSpans[4] = {0, 128, 64, 32};
    span_ = kSpans[bits >> 62];
  }

  // The 16 bytes that hold elements 8 i to 8 i + 7 of a row: of the dimension that is summed over in K-major matrices,
  // whose rows are those of the other dimension; and the other way round.
  uint32_t chunk(bool transposed, int row, int i) const {
    if (!transposed) {
      const uint32_t group = start_ + row / 8 * stride_;
      return span_ == 0 ? group + row % 8 * 16 + i * leading_ : swizzled(group + row % 8 * span_ + i * 16, span_);
    }
    if (span_ == 0) return start_ + i * stride_ + row % 8 * 16 + row / 8 * leading_;
    const int per_row = span_ / 16;
    return swizzled(start_ + i / per_row * leading_ + i % per_row * 16 + row % 8 * span_ + row / 8 * stride_, span_);
  }

 private:
  uint32_t start_, leading_, stride_;
  int span_;
};

// Calls f(address of 16 bytes, row, column of the first element) for a matrix of `rows` (M or N) and 32 bytes of K.
template <class F>
static void for_each_chunk(uint64_t descriptor, bool transposed, int rows, const Where& where, const F& f) {
  const Descriptor d(descriptor, where);
  const int outer = transposed ? 16 : rows, inner = transposed ? rows / 8 : 2;
  for (int row = 0; row < outer; ++row) {
    for (int i = 0; i < inner; ++i) f(d.chunk(transposed, row, i), row, i);
  }
}

// What accumulators hold while products run: a NaN, and a signalling one, which any arithmetic turns into another.
constexpr uint32_t kInFlight = 0x7fa0dead;
static bool untouched(const float& value) { return memcmp(&value, &kInFlight, 4) == 0; }
static void set_in_flight(float& value) { memcpy(&value, &kInFlight, 4); }

// Row and column of a thread's register d[i / (n / 4)][i % (n / 4)].
static int fragment_row(int lane, int n, int i) { return lane / 32 * 16 + lane % 32 / 4 + i / (n / 4) * 8; }
static int fragment_col(int lane, int n, int i) { return i % (n / 4) / 2 * 8 + lane % 4 * 2 + i % 2; }

class WarpgroupModel {
 public:
  explicit WarpgroupModel(const Where& where) : m_(machine()), where_(m_.note(where)) {
    const size_t index = m_.thread() / kWarpgroup;
    if (index >= m_.mine().warpgroups.size()) fail(where_, "the block has no whole warpgroups");
    w_ = &m_.mine().warpgroups[index];
    lane_ = m_.thread() % kWarpgroup;
    first_ = m_.running() - lane_;
    if (w_->agent == 0) {
      w_->agent = m_.clocks().add_agent(
          text("products of threads %d-%d", m_.thread() - lane_, m_.thread() - lane_ + kWarpgroup - 1), where_);
    }
  }

  void fence() { lane().fenced = true; }

  void issue(const ProductForm& form, float* d, const uint32_t* a) {
    const uint32_t index = lane().issued++;
    const bool first = index == w_->done + w_->running.size();
    if (first) {
      w_->running.emplace_back();
      w_->running.back().form = form;
      w_->running.back().where = where_;
    }
    Product& product = w_->running[index - w_->done];
    if (!(product.form == form)) fail(where_, "the warpgroup's threads issue different products");
    if (first) {
      product.d = accumulator(form.n, d);
      ++product.d->running;
    }
    enter(*product.d, form, d);
    if (form.registers_a) {
      product.a[lane_] = a;
      memcpy(product.a_values[lane_].data(), a, 16);
      m_.clocks().settle_loads(m_.running());
    }
    if (++product.issued == kWarpgroup) {
      check_operands(product, index);
      ++w_->ready;
      for (const Warpgroup::Waiter& waiter : w_->waiting) {
        if (waiter.until == w_->ready) return defer_carrying_out(waiter.until);
      }
    }
  }

  void commit() {
    const uint32_t group = lane().groups++;
    if (group == w_->groups.size()) w_->groups.push_back(lane().issued);
    if (w_->groups[group] != lane().issued) fail(where_, "the warpgroup's threads commit different products");
    lane().fenced = false;
  }

  void wait(int pending) {
    lane().fenced = false;
    if (lane().groups <= uint32_t(pending)) return;
    const uint32_t until = w_->groups[lane().groups - 1 - pending];
    if (w_->done < until && w_->ready < until) {
      w_->waiting.push_back({m_.running(), until});
      m_.sleep(where_);
    } else {
      carry_out(until);
    }
    lane().waited = std::max(lane().waited, until);
    m_.clocks().learn(m_.running(), w_->agent, until);
  }

 private:
  Warpgroup::Lane& lane() { return w_->lanes[lane_]; }

  std::shared_ptr<Accumulator> accumulator(int n, const float* registers) {
    for (const auto& a : w_->accumulators) {
      if (a->registers[lane_] == registers && a->n == n) return a;
    }
    const auto made = std::make_shared<Accumulator>();
    made->n = n;
    made->values.assign(kProductRows * n, 0.0f);
    w_->accumulators.push_back(made);
    return made;
  }

  // This thread's part of a product's registers becomes the product's.
  void enter(Accumulator& d, const ProductForm& form, float* registers) {
    const int count = form.n / 2;
    for (const auto& other : w_->accumulators) {
      const float* theirs = other->registers[lane_];
      if (other.get() != &d && theirs != nullptr && registers < theirs + other->n / 2 && theirs < registers + count) {
        fail(where_, "the registers of two running products overlap");
      }
    }
    const bool chained = d.registers[lane_] != nullptr;
    if (!lane().fenced && (!chained || form.registers_a)) {
      fail(where_,
           "no wgmma_fence between the last wgmma_wait or wgmma_commit and a product whose registers may have "
           "been touched");
    }
    if (chained) {
      if (d.registers[lane_] != registers) fail(where_, "the warpgroup's threads add to different registers");
      check_untouched(registers, count);
    } else {
      d.registers[lane_] = registers;
      for (int i = 0; i < count && form.accumulate; ++i) {
        d.values[fragment_row(lane_, form.n, i) * form.n + fragment_col(lane_, form.n, i)] = registers[i];
      }
      for (int i = 0; i < count; ++i) set_in_flight(registers[i]);
    }
  }
  void check_untouched(const float* registers, int count) {
    for (int i = 0; i < count; ++i) {
      if (!untouched(registers[i])) fail(where_, text("accumulator %d was changed while a product runs", i));
    }
  }

  void check_operands(const Product& product, uint32_t index) {
    SharedMemory::AsyncRead read{first_, kWarpgroup, w_->agent, index + 1};
    SharedMemory& shared = m_.mine().shared;
    const ProductForm& form = product.form;
    const auto check = [&](uint32_t address, int, int) { shared.read_async(read, address, where_); };
    if (!form.registers_a) for_each_chunk(form.a, form.transposed_a, kProductRows, where_, check);
    for_each_chunk(form.b, form.transposed_b, form.n, where_, check);
  }

  void defer_carrying_out(uint32_t until) {
    m_.defer([where = where_, until] { WarpgroupModel(where).carry_out(until); });
  }
  void carry_out(uint32_t until) {
    while (w_->done < until) {
      carry_out(w_->running.front());
      w_->running.pop_front();
      ++w_->done;
    }
    auto& waiting = w_->waiting;
    for (size_t i = 0; i < waiting.size();) {
      if (waiting[i].until > w_->done) {
        ++i;
        continue;
      }
      m_.wake(waiting[i].thread);
      waiting[i] = waiting.back();
      waiting.pop_back();
    }
  }

  // The sums are of exact products in f32, in the order of k; tensor cores add in an order and with a rounding of their
  // own.
  void carry_out(const Product& product) {
    const ProductForm& form = product.form;
    const int depth = 32 / element_bytes(form.type_a);
    static thread_local std::vector<float> a, b;  // [m][k], [k][n]
    a.resize(kProductRows * depth);
    b.resize(depth * form.n);
    if (form.registers_a) {
      unpack_registers(product, depth, a.data());
    } else {
      unpack(form.a, form.transposed_a, form.type_a, kProductRows,
             [&](int m, int k) -> float& { return a[m * depth + k]; });
    }
    unpack(form.b, form.transposed_b, form.type_b, form.n, [&](int n, int k) -> float& { return b[k * form.n + n]; });
    Accumulator& d = *product.d;
    if (!form.accumulate) std::fill(d.values.begin(), d.values.end(), 0.0f);
    for (int m = 0; m < kProductRows; ++m) multiply(&a[m * depth], b.data(), depth, form.n, &d.values[m * form.n]);
    ++m_.count().warpgroup_products;
    if (--d.running == 0) finish(product);
  }
  static void multiply(const float* a, const float* b, int depth, int n, float* __restrict d) {
    for (int k = 0; k < depth; ++k) {
      for (int col = 0; col < n; ++col) d[col] += a[k] * b[k * n + col];
    }
  }
  template <class Place>
  void unpack(uint64_t descriptor, bool transposed, int type, int rows, const Place& place) {
    const SharedMemory& shared = m_.mine().shared;
    const int count = SharedMemory::kChunk / element_bytes(type);
    for_each_chunk(descriptor, transposed, rows, where_, [&](uint32_t address, int row, int i) {
      float values[SharedMemory::kChunk];
      to_floats(type, shared.peek(address), count, values);
      for (int x = 0; x < count; ++x) {
        (transposed ? place(i * count + x, row) : place(row, i * count + x)) = values[x];
      }
    });
  }
  // Register r holds 4 bytes of K of row lane / 4 + r % 2 * 8, the 16 bytes of r / 2.
  void unpack_registers(const Product& product, int depth, float* a) {
    const int type = product.form.type_a, per_register = 4 / element_bytes(type);
    for (int lane = 0; lane < kWarpgroup; ++lane) {
      if (memcmp(product.a[lane], product.a_values[lane].data(), 16) != 0) {
        fail(product.where, text("thread %d of the warpgroup changed registers of A while the product ran", lane));
      }
      for (int r = 0; r < 4; ++r) {
        unsigned char bytes[4];
        memcpy(bytes, &product.a_values[lane][r], 4);
        const int row = lane / 32 * 16 + lane % 32 / 4 + r % 2 * 8;
        to_floats(type, bytes, per_register, a + row * depth + r / 2 * (depth / 2) + lane % 4 * per_register);
      }
    }
  }
  // No product adds to the registers any more: the threads get them back.
  void finish(const Product& product) {
    Accumulator& d = *product.d;
    for (int lane = 0; lane < kWarpgroup; ++lane) {
      check_untouched(d.registers[lane], d.n / 2);
      for (int i = 0; i < d.n / 2; ++i) {
        d.registers[lane][i] = d.values[fragment_row(lane, d.n, i) * d.n + fragment_col(lane, d.n, i)];
      }
    }
    auto& all = w_->accumulators;
    all.erase(std::find(all.begin(), all.end(), product.d));
  }

  Machine& m_;
  const Where where_;
  Warpgroup* w_;
  int lane_, first_;
};

void fence_products(const Where& where) { WarpgroupModel(where).fence(); }
void issue_product(const ProductForm& form, float* d, const uint32_t* a, const Where& where) {
  WarpgroupModel(where).issue(form, d, a);
}
void commit_products(const Where& where) { WarpgroupModel(where).commit(); }
void wait_for_products(int pending, const Where& where) { WarpgroupModel(where).wait(pending); }

void set_registers(int count, bool grow, const Where& where) {
  Machine& m = machine();
  m.meet_warpgroup(where);
  Machine::Block& block = m.mine();
  const int index = m.thread() / kWarpgroup;
  if (count < 24 || count > 256 || count % 8 != 0) fail(where, text("%d registers: a multiple of 8, 24 to 256", count));
  const int before = block.registers[index];
  if (grow ? count < before : count > before) {
    fail(where, text("to %d registers from %d, by the instruction for the other way", count, before));
  }
  const auto others = [&] {
    int sum = 0;
    for (size_t i = 0; i < block.registers.size(); ++i) sum += int(i) == index ? 0 : block.registers[i];
    return sum;
  };
  while (others() + count > block.register_pool) {
    block.waiting_for_registers.push_back(m.running());
    m.sleep(where);
  }
  block.registers[index] = count;
  if (grow) return;
  for (int t : block.waiting_for_registers) m.wake(t);
  block.waiting_for_registers.clear();
}

}  // namespace emulator

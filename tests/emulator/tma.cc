// What moves between global and shared memory by itself: boxes of tensors (TMA), and plain runs of bytes.
#include "tma.h"

#include "mbarrier.h"

namespace emulator {

std::string why_refused(const TensorMap& map) {
  if (map.base == nullptr || reinterpret_cast<uintptr_t>(map.base) % 16 != 0) return "its base is no multiple of 16";
  if (map.rank < 1 || map.rank > 5) return text("it has %d dimensions", map.rank);
  for (int i = 0; i < map.rank; ++i) {
    if (map.extents[i] == 0) return text("extent %d is 0", i);
    if (map.box[i] < 1 || map.box[i] > 256)
      return text("extent %d of its box is %d, not one of 1 to 256", i, map.box[i]);
    if (i == 0) continue;
    const uint64_t stride = map.strides[i - 1];
    if (stride % 16 != 0 || stride >= uint64_t(1) << 40) {
      return text("stride %d is %llu bytes, no multiple of 16 below 2^40", i, static_cast<unsigned long long>(stride));
    }
  }
  const int row_bytes = map.box[0] * map.element_bytes;
  if (row_bytes % 16 != 0) return text("rows of its box have %d bytes, no multiple of 16", row_bytes);
  if (map.swizzle != 0 && row_bytes > map.swizzle) {
    return text("rows of its box have %d bytes, the swizzle has %d", row_bytes, map.swizzle);
  }
  return "";
}

// Calls f(place in the box, address, bytes) for the part of each of the box's rows that lies inside the tensor.
template <class F>
static void for_each_row(const TensorMap& map, const int (&at)[5], const F& f) {
  const int row_bytes = map.box[0] * map.element_bytes, rows = map.box_bytes() / row_bytes;
  const int64_t begin = std::max<int64_t>(at[0], 0),
                end = std::min<int64_t>(int64_t(at[0]) + map.box[0], map.extents[0]);
  for (int row = 0; row < rows && begin < end; ++row) {
    int rest = row;
    bool inside = true;
    unsigned char* p = map.base + begin * map.element_bytes;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t x = int64_t(at[i]) + rest % map.box[i];
      rest /= map.box[i];
      inside = inside && x >= 0 && x < int64_t(map.extents[i]);
      if (inside) p += x * map.strides[i - 1];
    }
    if (inside) f(row * row_bytes + int(begin - at[0]) * map.element_bytes, p, size_t(end - begin) * map.element_bytes);
  }
}

// Bytes on their way to the same place of a few blocks, for the mbarriers at the same place.
struct Transfer {
  uint32_t shared, mbarrier;  // local addresses
  uint16_t ranks;
  int swizzle, unit;  // bytes that lie together, whatever the swizzle
  std::vector<unsigned char> bytes;
};

static void start_transfer(Transfer&& transfer, const Where& where) {
  Machine& m = machine();
  const auto shared = std::make_shared<const Transfer>(std::move(transfer));
  for (int rank = 0; rank < 16; ++rank) {
    if ((shared->ranks >> rank & 1) == 0) continue;
    Machine::Block& block = m.block_of_rank(rank, where);
    Mbarrier& b = find_mbarrier(block, shared->mbarrier, true, where);
    const int size = int(shared->bytes.size());
    for (int i = 0; i < size; i += shared->unit) {
      block.shared.start_transfer(m.running(), b.agent, swizzled(shared->shared + i, shared->swizzle), shared->unit,
                                  where);
    }
    m.defer([shared, &block, &b, where, size] {
      touch_block(block, b.agent, landing_clock(b), where);
      for (int i = 0; i < size; i += shared->unit) {
        const uint32_t to = swizzled(shared->shared + i, shared->swizzle);
        memcpy(block.shared.land(b.agent, landing_clock(b), to, shared->unit), shared->bytes.data() + i, shared->unit);
      }
      complete_bytes(b, size, where);
    });
  }
}

static void check_alignment(uint32_t shared, int alignment, const Where& where) {
  if (shared % alignment == 0) return;
  fail(where, text("misaligned shared address: byte %d needs a multiple of %d", offset_in_block(shared), alignment));
}

void tma_load(uint32_t shared, const TensorMap& map, uint32_t mbarrier, const int (&at)[5], uint16_t ranks,
              const Where& where) {
  Machine& m = machine();
  m.note(where);
  check_alignment(shared, 128, where);
  Transfer transfer{shared, mbarrier, ranks, map.swizzle, SharedMemory::kChunk, {}};
  transfer.bytes.assign(map.box_bytes(), 0);
  for_each_row(map, at, [&](int place, const unsigned char* p, size_t bytes) {
    const auto from = m.global().read_bytes(m.thread_in_grid(), p, bytes, map.element_bytes, where);
    memcpy(transfer.bytes.data() + place, from, bytes);
  });
  m.count().tma_bytes += transfer.bytes.size();
  start_transfer(std::move(transfer), where);
}

static void check_bulk(uint32_t shared, const void* global, int bytes, const Where& where) {
  check_alignment(shared, 16, where);
  if (bytes <= 0 || bytes % 16 != 0) fail(where, text("%d bytes are no multiple of 16", bytes));
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail(where, text("misaligned global address %p", global));
}

void bulk_copy(uint32_t shared, const void* global, int bytes, uint32_t mbarrier, const Where& where) {
  Machine& m = machine();
  m.note(where);
  check_bulk(shared, global, bytes, where);
  const auto from = m.global().read_bytes(m.thread_in_grid(), global, bytes, 16, where);
  m.count().tma_bytes += bytes;
  const uint16_t own = uint16_t(1 << m.rank());
  start_transfer({shared, mbarrier, own, 0, SharedMemory::kChunk, {from, from + bytes}}, where);
}

void store_remote_32(uint32_t shared, uint32_t value, uint32_t mbarrier, int rank, const Where& where) {
  machine().note(where);
  Transfer transfer{shared, mbarrier, uint16_t(1 << rank), 0, 4, {}};
  transfer.bytes.assign(reinterpret_cast<unsigned char*>(&value), reinterpret_cast<unsigned char*>(&value) + 4);
  start_transfer(std::move(transfer), where);
}

// A store of this thread, which reads shared memory that is busy until the thread waits for that.
static SharedMemory::AsyncRead start_store(int bytes, const Where& where) {
  Machine& m = machine();
  Storer& storer = m.storer();
  if (storer.agent == 0) {
    storer.agent = m.clocks().add_agent("TMA stores of " + m.clocks().name(m.running()), where);
  }
  m.count().tma_bytes += bytes;
  return {m.running(), 1, storer.agent, ++storer.issued};
}
// Bytes [begin, begin + size) of what starts at `shared`.
static void take_bytes(SharedMemory::AsyncRead& read, uint32_t shared, int begin, int size, int swizzle,
                       unsigned char* to, const Where& where) {
  constexpr int kChunk = SharedMemory::kChunk;
  for (int chunk = begin / kChunk * kChunk; chunk < begin + size; chunk += kChunk) {
    const unsigned char* from = machine().mine().shared.read_async(read, swizzled(shared + chunk, swizzle), where);
    const int first = std::max(chunk, begin), last = std::min(chunk + kChunk, begin + size);
    memcpy(to + first - begin, from + first - chunk, last - first);
  }
}

void tma_store(const TensorMap& map, uint32_t shared, const int (&at)[5], const Where& where) {
  Machine& m = machine();
  m.note(where);
  check_alignment(shared, 128, where);
  SharedMemory::AsyncRead read = start_store(map.box_bytes(), where);
  for_each_row(map, at, [&](int place, unsigned char* p, size_t bytes) {
    unsigned char* to = m.global().write_bytes(m.thread_in_grid(), p, bytes, map.element_bytes, where);
    take_bytes(read, shared, place, int(bytes), map.swizzle, to, where);
  });
}

void bulk_add(float* global, uint32_t shared, int bytes, const Where& where) {
  Machine& m = machine();
  m.note(where);
  check_bulk(shared, global, bytes, where);
  SharedMemory::AsyncRead read = start_store(bytes, where);
  std::vector<unsigned char> terms(bytes);
  take_bytes(read, shared, 0, bytes, 0, terms.data(), where);
  for (int i = 0; i < bytes / 4; ++i) {
    float value;
    memcpy(&value, &terms[i * 4], 4);
    add_float(m.add_global(global + i, 4, where), value);
  }
}

void commit_stores() { machine().storer().committed = machine().storer().issued; }
void wait_for_stores(const Where& where) {
  Machine& m = machine();
  m.note(where);
  Storer& storer = m.storer();
  storer.read = storer.committed;
  if (storer.agent != 0) m.clocks().learn(m.running(), storer.agent, storer.read);
}

}  // namespace emulator

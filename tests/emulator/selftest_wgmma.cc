// Every form of wgmma's operands on one tile: C (64 x n) = A (64 x 128 bytes of K) B, by one warpgroup. Operands arrive
// by TMA, as far as the tensors reach, with any swizzle. C leaves as f32 by plain stores, and as f16 by stmatrix and
// TMA; the sums of its rows by bulk copies and reductions.
#include "api.h"
#include "sm90/ptx.cuh"

namespace jfa::sm90 {
namespace {

enum class Bug : int { kNone, kTouchA, kNoWaitForReduction, kMisalignedBulk, kDescriptorBits, kCount };

constexpr int kRows = 64, kDepthBytes = 256, kTileBytes = 256 * 256;

struct Smem {
  alignas(1024) unsigned char a[kTileBytes], b[kTileBytes], c[kRows * 512];
  float sums[kRows], terms[kRows];
  alignas(8) uint64_t loaded, terms_loaded;
};

// A matrix of shared memory, cut into chunks of `span` bytes of its rows (16: no swizzle), one after another.
struct Operand {
  uint32_t address;
  int span, rows;
  bool transposed;  // rows are those of K

  uint64_t descriptor(int step) const {
    const bool plain = span == 16;
    const int chunk_bytes = rows * span;
    const int offset = transposed ? step * 16 * span : step * 32 / span * chunk_bytes + step * 32 % span;
    int leading = chunk_bytes, stride = 8 * span;
    if (plain && transposed) std::swap(leading, stride);
    const uint64_t mode = plain ? 0 : span == 128 ? 1 : span == 64 ? 2 : 3;
    return mode << 62 | uint64_t(stride / 16) << 32 | uint64_t(leading / 16) << 16 | (address + offset) / 16;
  }
};

// All the boxes with columns of a tile.
void load(const TensorMap& map, uint32_t to, uint32_t mbarrier, int row_bytes) {
  const int span = map.box[0] * map.element_bytes, chunks = (row_bytes + span - 1) / span;
  mbarrier_arrive_expect(mbarrier, chunks * map.box_bytes());
  for (int chunk = 0; chunk < chunks; ++chunk) {
    tma_load(to + chunk * map.box_bytes(), map, mbarrier, chunk * map.box[0], 0, 0, 0);
  }
}

template <class Element, int kN, bool kRegistersA, bool kTransposedA, bool kTransposedB>
void product(TensorMap a, TensorMap b, TensorMap c, float* wide, float* sums, const float* terms, int m, int n,
             Bug bug) {
  constexpr int kDepth = kDepthBytes / sizeof(Element);
  Smem& smem = shared_memory<Smem>();
  const int thread = thread_index(), lane = lane_index(), warp = warp_index();
  const uint32_t loaded = shared_address(&smem.loaded), terms_loaded = shared_address(&smem.terms_loaded);
  const Operand operand_a = {shared_address(smem.a), a.box[0] * a.element_bytes, kTransposedA ? kDepth : kRows,
                             kTransposedA};
  const Operand operand_b = {shared_address(smem.b), b.box[0] * b.element_bytes, kTransposedB ? kDepth : kN,
                             kTransposedB};
  if (thread == 0) {
    mbarrier_init(loaded, 2);
    mbarrier_init(terms_loaded, 1);
    mbarrier_init_fence();
    load(a, operand_a.address, loaded, kTransposedA ? kRows * 2 : kDepthBytes);
    load(b, operand_b.address, loaded, kTransposedB ? kN * 2 : kDepthBytes);
    mbarrier_arrive_expect(terms_loaded, sizeof(smem.terms));
    bulk_copy(shared_address(smem.terms), terms, sizeof(smem.terms), terms_loaded);
  }
  barrier();
  mbarrier_wait(loaded, 0);

  float d[2][kN / 4];
  uint32_t registers[kDepthBytes / 32][4];
  if (kRegistersA) {
    for (int step = 0; step < kDepthBytes / 32; ++step) {
      const int chunk = 2 * step + lane / 16, row = warp * 16 + lane % 16, per_row = operand_a.span / 16;
      const uint32_t at = operand_a.address + chunk / per_row * kRows * operand_a.span + row * operand_a.span;
      load_matrix_x4(registers[step], emulator::swizzled(at + chunk % per_row * 16, a.swizzle));
    }
  }
  wgmma_fence();
  for (int step = 0; step < kDepthBytes / 32; ++step) {
    uint64_t other = operand_b.descriptor(step);
    if (bug == Bug::kDescriptorBits) other |= uint64_t(1) << 15;
    if constexpr (kRegistersA) {
      Wgmma<kN>::template rs<Element, kTransposedB>(d, registers[step], other, step != 0);
    } else {
      Wgmma<kN>::template ss<Element, kTransposedA, kTransposedB>(d, operand_a.descriptor(step), other, step != 0);
    }
  }
  wgmma_commit();
  if (bug == Bug::kTouchA && thread == 50) registers[2][1] ^= 0x8000;
  wgmma_wait<0>();

  float total[2] = {};
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + lane / 4 + r * 8;
    for (int i = 0; i < kN / 4; ++i) {
      const int col = i / 2 * 8 + lane % 4 * 2 + i % 2;
      total[r] += d[r][i];
      if (row < m && col < n) store_global(wide + row * n + col, d[r][i]);
    }
    for (int mask = 1; mask < 4; mask *= 2) total[r] += shuffle_xor(total[r], mask);
    if (lane % 4 == 0) store_shared_f32(shared_address(&smem.sums[row]), total[r]);
  }
  // Chunks of 64 columns with the 128-byte swizzle.
  for (int block = 0; block < kN / 16; ++block) {
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) {
      const __half2 two = __floats2half2_rn(d[i % 2][4 * block + i / 2 * 2], d[i % 2][4 * block + i / 2 * 2 + 1]);
      memcpy(&r[i], &two, 4);
    }
    const int row = warp * 16 + lane % 16, chunk = 2 * block + lane / 16;
    const uint32_t at = shared_address(smem.c) + chunk / 8 * kRows * 128 + row * 128 + chunk % 8 * 16;
    store_matrix_x4(emulator::swizzled(at, 128), r);
  }
  fence_async_shared();
  barrier();
  mbarrier_wait(terms_loaded, 0);
  if (thread == 0) {
    for (int col = 0; col < kN; col += 64) tma_store(c, shared_address(smem.c) + col / 64 * kRows * 128, col, 0, 0, 0);
    tma_reduce_add(sums, shared_address(smem.sums) + (bug == Bug::kMisalignedBulk ? 8 : 0), sizeof(smem.sums));
    tma_reduce_add(sums, shared_address(smem.terms), sizeof(smem.terms));
    tma_store_commit();
    if (bug != Bug::kNoWaitForReduction) tma_store_wait_read();
  }
  barrier();
  store_shared_f32(shared_address(&smem.sums[thread % kRows]) + thread / kRows * sizeof(smem.sums), 0.0f);
}

using Kernel = void (*)(TensorMap, TensorMap, TensorMap, float*, float*, const float*, int, int, Bug);

template <class Element, int kN>
Kernel sixteen_bits(int form) {
  const Kernel forms[] = {product<Element, kN, false, false, false>, product<Element, kN, false, false, true>,
                          product<Element, kN, false, true, true>, product<Element, kN, true, false, false>,
                          product<Element, kN, true, false, true>};
  return forms[form];
}
template <class Element>
Kernel eight_bits(int form) {
  return form == 0 ? product<Element, 96, false, false, false> : product<Element, 96, true, false, false>;
}
Kernel choose(int type, int n, int form) {
  if (type == emulator::kE4m3) return eight_bits<__nv_fp8_e4m3>(form);
  if (type == emulator::kE5m2) return eight_bits<__nv_fp8_e5m2>(form);
  if (type == emulator::kBfloat16) return sixteen_bits<__nv_bfloat16, 96>(form);
  switch (n) {
    case 64:
      return sixteen_bits<__half, 64>(form);
    case 96:
      return sixteen_bits<__half, 96>(form);
    case 128:
      return sixteen_bits<__half, 128>(form);
    case 256:
      return sixteen_bits<__half, 256>(form);
    default:
      return nullptr;
  }
}

TensorMap make_map(void* data, int rows, int cols, int element_bytes, int box_rows, int span) {
  TensorMap map;
  map.base = static_cast<unsigned char*>(data);
  map.rank = 2;
  map.element_bytes = element_bytes;
  map.extents[0] = cols;
  map.extents[1] = rows;
  map.strides[0] = uint64_t(cols) * element_bytes;
  map.box[0] = span / element_bytes;
  map.box[1] = box_rows;
  map.swizzle = span == 16 ? 0 : span;
  return map;
}

}  // namespace
}  // namespace jfa::sm90

extern "C" int selftest_wgmma_bugs() { return int(jfa::sm90::Bug::kCount); }

// Forms: 0 both operands K-major in shared memory, 1 B [k, n], 2 also A [k, m], 3 as 0 with A in registers, 4 as 1 with
// A in registers. Matrices have the extents given, up to the tile's 64, tile_n and 256 bytes. sums [64] += rows +
// terms.
extern "C" void selftest_wgmma(Session* session, emulator::GlobalMemory* memory, void* a, void* b, float* wide, void* c,
                               float* sums, const float* terms, int type, int tile_n, int form, int span_a, int span_b,
                               int m, int n, int k, int bug) {
  using namespace jfa::sm90;
  const int bytes = emulator::element_bytes(type), depth = kDepthBytes / bytes;
  const bool transposed_a = form == 2, transposed_b = form == 1 || form == 2 || form == 4;
  const TensorMap map_a =
      transposed_a ? make_map(a, k, m, bytes, depth, span_a) : make_map(a, m, k, bytes, kRows, span_a);
  const TensorMap map_b =
      transposed_b ? make_map(b, k, n, bytes, depth, span_b) : make_map(b, n, k, bytes, tile_n, span_b);
  const TensorMap map_c = make_map(c, m, n, 2, kRows, 128);
  for (const TensorMap* map : {&map_a, &map_b, &map_c}) {
    const std::string why = emulator::why_refused(*map);
    if (!why.empty()) snprintf(session->fault, sizeof(session->fault), "%s", why.c_str());
  }
  memory->set(sums, 0, kRows * sizeof(float));
  const Kernel kernel = choose(type, tile_n, form);
  emulator::launch(*session, *memory, 1, emulator::kWarpgroup, sizeof(Smem),
                   [=] { kernel(map_a, map_b, map_c, wide, sums, terms, m, n, static_cast<Bug>(bug)); });
}

// Device memory in which mistakes show: each buffer is an allocation of its own.
//
// Guarded, for runs without a sanitizer: bands around it and, where it is written, its former contents are all ones.
// That is NaN in each floating type, so that reads past an end or of what was never set show in the results, and what
// changed outside, or did not change inside, is found afterwards.
// Unguarded, for the sanitizers: exactly as large as the data, and unwritten before the kernels; they watch both.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

namespace sanitizer {

using Bytes = std::vector<unsigned char>;

inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorName(error));
}

inline void check(const jfa::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

class Buffer {
 public:
  // Without `contents` the buffer is one that kernels write, in elements of `element_bytes`.
  Buffer(std::string name, size_t bytes, const Bytes* contents, size_t element_bytes, bool guarded, bool filled)
      : name_(std::move(name)), bytes_(bytes), element_bytes_(element_bytes), band_(guarded ? kBand : 0) {
    check(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes_ + 2 * band_), "allocating " + name_);
    if (contents != nullptr) contents_ = *contents;
    if (guarded || filled || contents != nullptr) fill();
  }
  ~Buffer() { cudaFree(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T = void>
  T* data() const {
    return reinterpret_cast<T*>(memory_ + band_);
  }
  bool guarded() const { return band_ != 0; }
  bool is_input() const { return !contents_.empty(); }

  // As it was before the kernels.
  void fill() const {
    Bytes image(bytes_ + 2 * band_, kPoison);
    std::copy(contents_.begin(), contents_.end(), image.begin() + band_);
    check(cudaMemcpy(memory_, image.data(), image.size(), cudaMemcpyHostToDevice), "filling " + name_);
    // A copy from pageable memory may return early, and the kernels' stream does not wait for the default one.
    check(cudaDeviceSynchronize(), "filling " + name_);
  }

  // What it holds now. Throws where the bands, or an input, have changed.
  Bytes read() const {
    Bytes image(bytes_ + 2 * band_);
    check(cudaMemcpy(image.data(), memory_, image.size(), cudaMemcpyDeviceToHost), "reading " + name_);
    for (size_t n = 0; n < image.size(); ++n) {
      if ((n < band_ || n >= band_ + bytes_) && image[n] != kPoison) {
        throw std::runtime_error(name_ + ": guard band changed at byte " + std::to_string(int64_t(n) - int64_t(band_)) +
                                 " of " + std::to_string(bytes_));
      }
    }
    Bytes payload(image.begin() + band_, image.end() - band_);
    if (is_input() && payload != contents_) throw std::runtime_error("input " + name_ + " was written");
    return payload;
  }

  // The same of an output, of which each element must have been written.
  Bytes read_written() const {
    const Bytes payload = read();
    for (size_t n = 0; guarded() && n < payload.size(); n += element_bytes_) {
      const auto first = payload.begin() + n;
      if (std::all_of(first, first + element_bytes_, [](unsigned char x) { return x == kPoison; })) {
        throw std::runtime_error(name_ + " was not written at element " + std::to_string(n / element_bytes_) + " of " +
                                 std::to_string(bytes_ / element_bytes_));
      }
    }
    return payload;
  }

 private:
  static constexpr unsigned char kPoison = 0xff;
  static constexpr size_t kBand = 4096 + 16;  // data lies at a multiple of 16 bytes and no more, as XLA promises

  std::string name_;
  size_t bytes_, element_bytes_, band_;
  Bytes contents_;
  unsigned char* memory_ = nullptr;
};

// The buffers of one call.
class Memory {
 public:
  explicit Memory(bool guarded) : guarded_(guarded) {}

  const Buffer* input(const char* name, const Bytes& contents) {
    return add(name, contents.size(), &contents, 1, false);
  }
  // `filled`: unguarded too, once. For what TMA stores: initcheck before 2025.4 (CUDA 13.1) does not see it written.
  const Buffer* output(const char* name, size_t elements, size_t element_bytes, bool filled = false) {
    return add(name, elements * element_bytes, nullptr, element_bytes, filled);
  }

  // Outputs and scratch become poison again.
  void poison() const {
    for (const auto& buffer : buffers_) {
      if (buffer->guarded() && !buffer->is_input()) buffer->fill();
    }
  }
  // All bands and inputs are as they were. Unguarded, nothing is read that a kernel may have left unwritten.
  void check_untouched() const {
    for (const auto& buffer : buffers_) {
      if (buffer->guarded() || buffer->is_input()) buffer->read();
    }
  }

 private:
  const Buffer* add(const char* name, size_t bytes, const Bytes* contents, size_t element_bytes, bool filled) {
    if (bytes == 0) throw std::logic_error(std::string(name) + " is empty");
    buffers_.push_back(std::make_unique<Buffer>(name, bytes, contents, element_bytes, guarded_, filled));
    return buffers_.back().get();
  }

  bool guarded_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

}  // namespace sanitizer

// Inputs of known values on buffers of exactly their size, for the programs that sanitizers watch.
#pragma once

#include <cstring>
#include <memory>

#include "args.h"
#include "half.h"

namespace {

using sk::Dtype;

// `count` elements of `size` bytes each, `shift` elements away from an aligned address.
class Buffer {
 public:
  Buffer(uint64_t count, uint64_t size, uint64_t shift)
      : bytes_((count + shift) * size),
        storage_(new char[bytes_]),
        data_(storage_.get() + shift * size) {
    memset(storage_.get(), 0xFF, bytes_);
  }
  template <class T>
  T* at() {
    return reinterpret_cast<T*>(data_);
  }
  uint64_t checksum() const {
    uint64_t sum = 14695981039346656037u;
    for (uint64_t i = 0; i < bytes_; ++i) sum = (sum ^ uint8_t(storage_[i])) * 1099511628211u;
    return sum;
  }

 private:
  uint64_t bytes_;
  std::unique_ptr<char[]> storage_;
  char* data_;
};

float value(uint64_t i) { return float(int64_t(i * 2654435761u % 2001) - 1000) * 0x1p-9f; }

Buffer floats(uint64_t count, uint64_t shift) {
  Buffer buffer(count, 4, shift);
  for (uint64_t i = 0; i < count; ++i) buffer.at<float>()[i] = value(i);
  return buffer;
}

Buffer squares(uint64_t count, uint64_t shift) {
  Buffer buffer(count, 4, shift);
  for (uint64_t i = 0; i < count; ++i) buffer.at<float>()[i] = value(i) * value(i);
  return buffer;
}

Buffer scores(uint64_t count, Dtype dtype, uint64_t shift) {
  if (dtype == Dtype::kFloat32) return floats(count, shift);
  Buffer buffer(count, 2, shift);
  for (uint64_t i = 0; i < count; ++i)
    buffer.at<uint16_t>()[i] = dtype == Dtype::kBFloat16
                                   ? sk::from_float<sk::BFloat16>(value(i)).bits
                                   : sk::from_float<sk::Float16>(value(i)).bits;
  return buffer;
}

// Of rows that are other samples at other draws and pieces, and then the largest of each.
Buffer addresses(uint64_t rows) {
  Buffer buffer(rows + 1, sizeof(sk::Address), 0);
  for (uint64_t i = 0; i < rows; ++i)
    buffer.at<sk::Address>()[i] = {(i * 2654435761u) << 14, uint32_t(i % 3), uint32_t(5 * i)};
  buffer.at<sk::Address>()[rows] = {(rows * 2654435761u) << 14, 2, uint32_t(5 * rows)};
  return buffer;
}

}  // namespace

// Grids and checked launches. Every kernel runs in blocks of kThreads threads laid out as quads.h
// says. The grid decides who does what, never what is computed.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"
#include "quads.h"

namespace sk {

using cuda::Place;

namespace {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("score_kernels._cuda: ") + what + ": " +
                             cudaGetErrorString(error));
}

// The device that a kernel goes to, made current and given back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0, device_;
};

// Threads along a row: enough for one turn where a block has them.
inline uint32_t width_of(uint64_t elements) {
  const uint64_t quads = (elements + kQuad - 1) / kQuad;
  uint32_t width = 1;
  while (width < kThreads && quads_a_turn(width) < quads) width *= 2;
  return width;
}

// Some waves of blocks a multiprocessor, few enough that each thread goes round its loop.
constexpr uint64_t kBlocksPerProcessor = 16;
constexpr uint64_t kMostRowBlocks = 65535;

inline uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// A grid over `pieces` of each row by all rows.
inline cudaLaunchConfig_t grid_of(uint64_t rows, uint64_t elements, uint64_t pieces,
                                  const Place& place) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, place.device),
        "cudaDeviceGetAttribute");
  const uint64_t most = kBlocksPerProcessor * std::max(processors, 1);
  const uint32_t width = width_of(elements), height = kThreads / width;
  const uint64_t down = std::min({ceil_div(rows, height), kMostRowBlocks, most});
  const uint64_t along = std::min(pieces, std::max<uint64_t>(1, most / down));
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(width, height, 1);
  config.gridDim = dim3(uint32_t(along), uint32_t(down), 1);
  config.stream = static_cast<cudaStream_t>(place.stream);
  return config;
}

// One piece a turn, for kernels without sums.
inline cudaLaunchConfig_t grid_of_turns(uint64_t rows, uint64_t elements, const Place& place) {
  const uint64_t quads = ceil_div(elements, kQuad);
  return grid_of(rows, elements, ceil_div(quads, quads_a_turn(width_of(elements))), place);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const cudaLaunchConfig_t& config,
            Arguments... arguments) {
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

// Whether whole quads can be read and written at once: rows of whole quads at aligned addresses.
inline bool aligned(const void* pointer, uint64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class T>
bool whole_quads(const T* pointer) {
  return aligned(pointer, kQuad * sizeof(T));
}

// Calls body with a null pointer of the dtype's element type.
template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(static_cast<float*>(nullptr));
    case Dtype::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case Dtype::kFloat16:
      return body(static_cast<Float16*>(nullptr));
  }
}

}  // namespace
}  // namespace sk

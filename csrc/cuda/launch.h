// Grids and checked launches. Every kernel runs in blocks of kThreads threads laid out as quads.h
// says. The grid decides who does what, never what is computed.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "quads.h"

namespace sk {
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

 private:
  int before_ = 0, device_;
};

// Threads along a row: enough for one iteration where a block has them.
inline uint32_t width_of(uint64_t elements) {
  const uint64_t quads = (elements + kQuad - 1) / kQuad;
  uint32_t width = 1;
  while (width < kThreads && quads_per_iteration(width) < quads) width *= 2;
  return width;
}

// Some waves of blocks a multiprocessor, few enough that each thread goes round its loop.
constexpr uint64_t kBlocksPerProcessor = 16;
constexpr uint64_t kMostRowBlocks = 65535;

inline uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

struct Grid {
  dim3 blocks, threads;
};

// A grid over `chunks` of each row by all rows.
inline Grid grid_of(uint64_t rows, uint64_t elements, uint64_t chunks, int device) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  const uint64_t most = kBlocksPerProcessor * std::max(processors, 1);
  const uint32_t width = width_of(elements), height = kThreads / width;
  const uint64_t down = std::min({ceil_div(rows, height), kMostRowBlocks, most});
  const uint64_t along = std::min(chunks, std::max<uint64_t>(1, most / down));
  return {dim3(uint32_t(along), uint32_t(down), 1), dim3(width, height, 1)};
}

// One chunk an iteration, for kernels without sums.
template <class Args>
Grid grid_of_quads(const Args& args, const DeviceAndStream& target) {
  const uint64_t quads = ceil_div(args.elements, kQuad);
  const uint64_t chunks = ceil_div(quads, quads_per_iteration(width_of(args.elements)));
  return grid_of(args.rows, args.elements, chunks, target.device);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid,
            const DeviceAndStream& target, Arguments... arguments) {
  const DeviceGuard guard(target.device);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.stream = static_cast<cudaStream_t>(target.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

inline bool aligned(const void* pointer, uint64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether quads can be read and written at once: rows of whole quads at aligned addresses.
template <class... Ts>
bool whole_quads(uint64_t elements, const Ts*... pointers) {
  return elements % kQuad == 0 && (aligned(pointers, kQuad * sizeof(Ts)) && ...);
}

// Calls body with the pointer as one to elements of the dtype.
template <class Body>
void with_dtype(Dtype dtype, const void* pointer, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(static_cast<const float*>(pointer));
    case Dtype::kBFloat16:
      return body(static_cast<const BFloat16*>(pointer));
    case Dtype::kFloat16:
      return body(static_cast<const Float16*>(pointer));
  }
}

template <class T>
using ElementOf = std::remove_const_t<std::remove_pointer_t<T>>;

}  // namespace
}  // namespace sk

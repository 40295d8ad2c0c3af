// Sums over rows that depend on nothing but the row. A row is cut into chunks of
// kIterationsPerChunk iterations; a chunk is summed in fp32 by its threads and then by a fixed
// tree, the chunks of a row in fp64 by one warp in a second kernel. No atomics; neither the grid
// nor the card enters.
#pragma once

#include "launch.h"

namespace sk {
namespace {

constexpr uint32_t kIterationsPerChunk = 2;
constexpr uint32_t kWarpsPerBlock = kThreads / kWarp;

inline uint64_t chunks_of(uint64_t elements) {
  const uint64_t quads = ceil_div(elements, kQuad);
  return ceil_div(quads, uint64_t{kIterationsPerChunk} * quads_per_iteration(width_of(elements)));
}

__device__ __forceinline__ Range range_of_chunk(uint32_t chunk, uint64_t elements) {
  const uint32_t quads = quads_per_iteration(blockDim.x);
  const uint64_t last = last_quad(elements);
  const uint64_t end = (uint64_t(chunk) + 1) * kIterationsPerChunk * quads - 1;
  return {chunk * kIterationsPerChunk * quads + quad_of_thread(), quads,
          uint32_t(last < end ? last : end)};
}

// Adds up `values` over the threads along a row; the first of them has the result. All threads of
// the block take part.
template <int kSums>
__device__ __forceinline__ void add_along_row(float (&values)[kSums]) {
  const uint32_t lanes = blockDim.x < kWarp ? blockDim.x : kWarp;
  for (int k = 0; k < kSums; ++k)
    for (uint32_t apart = lanes / 2; apart > 0; apart /= 2)
      values[k] += __shfl_down_sync(0xFFFFFFFFu, values[k], apart, lanes);
  if (blockDim.x <= kWarp) return;
  __shared__ float of_warps[kWarpsPerBlock][kSums];
  const uint32_t warps = blockDim.x / kWarp;
  const uint32_t warp = threadIdx.y * warps + threadIdx.x / kWarp;
  // What an earlier call left here has been read.
  __syncthreads();
  if (threadIdx.x % kWarp == 0)
    for (int k = 0; k < kSums; ++k) of_warps[warp][k] = values[k];
  __syncthreads();
  if (threadIdx.x == 0)
    for (uint32_t w = 1; w < warps; ++w)
      for (int k = 0; k < kSums; ++k) values[k] += of_warps[warp + w][k];
}

// Every chunk of every row: add(row, range, values) sums a thread's share, write(row, chunk,
// values) stores the whole. Rows go round together, so that all threads meet at the barriers.
template <int kSums, class Add, class Write>
__device__ __forceinline__ void sum_chunks(uint64_t rows, uint64_t elements, uint32_t chunks,
                                           const Add& add, const Write& write) {
  const uint64_t stride = uint64_t(gridDim.y) * blockDim.y;
  for (uint64_t first = uint64_t(blockIdx.y) * blockDim.y; first < rows; first += stride) {
    const uint64_t row = first + threadIdx.y;
    for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
      float values[kSums] = {};
      if (row < rows) add(row, range_of_chunk(chunk, elements), values);
      add_along_row(values);
      if (row < rows && threadIdx.x == 0) write(row, chunk, values);
    }
  }
}

// The second kernel: a warp adds the chunks of a row in fp64 and has write(row, sum) store that.
template <class Write>
__device__ __forceinline__ void add_chunks(uint64_t rows, const float* partial, uint32_t chunks,
                                           const Write& write) {
  for (uint64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < chunks; i += kWarp) sum += partial[row * chunks + i];
    for (uint32_t apart = kWarp / 2; apart > 0; apart /= 2)
      sum += __shfl_down_sync(0xFFFFFFFFu, sum, apart, kWarp);
    if (threadIdx.x == 0) write(row, sum);
  }
}

inline Grid grid_of_warps(uint64_t rows) {
  return {dim3(uint32_t(std::min<uint64_t>(rows, 1u << 30)), 1, 1), dim3(kWarp, 1, 1)};
}

}  // namespace
}  // namespace sk

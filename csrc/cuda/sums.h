// Sums over rows that depend on nothing but the row. A row is cut into pieces of kTurnsAPiece
// turns; a piece is summed in fp32 by its threads and then by a fixed tree, the pieces of a row in
// fp64 by one warp in a second kernel. No atomics; neither the grid nor the card enters.
#pragma once

#include "launch.h"

namespace sk {
namespace {

constexpr uint32_t kTurnsAPiece = 2;
constexpr uint32_t kWarpsABlock = kThreads / kWarp;

inline uint64_t pieces_of(uint64_t elements) {
  const uint64_t quads = ceil_div(elements, kQuad);
  return ceil_div(quads, uint64_t{kTurnsAPiece} * quads_a_turn(width_of(elements)));
}

// The turns of one piece.
__device__ __forceinline__ Walk walk_of_piece(uint32_t piece, uint64_t elements) {
  const uint32_t turn = quads_a_turn(blockDim.x);
  const uint64_t last = last_quad(elements), end = (uint64_t(piece) + 1) * kTurnsAPiece * turn - 1;
  return {piece * kTurnsAPiece * turn + quad_of_thread(), turn, uint32_t(last < end ? last : end)};
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
  __shared__ float of_warps[kWarpsABlock][kSums];
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

// Every piece of every row: add(row, walk, values) sums a thread's share, write(row, piece, values)
// stores the whole. Rows go round together, so that all threads meet at the barriers.
template <int kSums, class Add, class Write>
__device__ __forceinline__ void sum_pieces(uint64_t rows, uint64_t elements, uint32_t pieces,
                                           const Add& add, const Write& write) {
  const uint64_t stride = uint64_t(gridDim.y) * blockDim.y;
  for (uint64_t first = uint64_t(blockIdx.y) * blockDim.y; first < rows; first += stride) {
    const uint64_t row = first + threadIdx.y;
    for (uint32_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
      float values[kSums] = {};
      if (row < rows) add(row, walk_of_piece(piece, elements), values);
      add_along_row(values);
      if (row < rows && threadIdx.x == 0) write(row, piece, values);
    }
  }
}

// The second kernel's part: one warp adds the pieces of a row in fp64; lane 0 has the result.
__device__ __forceinline__ double add_pieces(const float* partial, uint32_t pieces) {
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < pieces; i += kWarp) sum += partial[i];
  for (uint32_t apart = kWarp / 2; apart > 0; apart /= 2)
    sum += __shfl_down_sync(0xFFFFFFFFu, sum, apart, kWarp);
  return sum;
}

// A warp a row.
inline cudaLaunchConfig_t grid_of_rows(uint64_t rows, const Place& place) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kWarp, 1, 1);
  config.gridDim = dim3(uint32_t(std::min<uint64_t>(rows, 1u << 30)), 1, 1);
  config.stream = static_cast<cudaStream_t>(place.stream);
  return config;
}

}  // namespace
}  // namespace sk

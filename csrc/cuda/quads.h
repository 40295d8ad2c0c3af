// What a thread works on. A quad is the four elements of one Philox block; rows are samples.
//
// A block of kThreads threads is `width` threads along a row by kThreads / width rows, both powers
// of two. Along a row a thread takes two quads a turn, 32 quads apart, so that a warp reads and
// writes whole lines and the second quad is at a fixed distance; rows of fewer than 33 quads are
// covered by one quad a thread. The grid's y axis runs over rows, so that no index is divided.
#pragma once

#include <cuda_runtime.h>

#include "../args.h"
#include "halves.h"
#include "pair.h"

namespace sk {
namespace {

constexpr uint32_t kThreads = 256, kWarp = 32, kQuad = 4;

// Quads of a row that `width` threads cover in a turn.
__host__ __device__ __forceinline__ uint32_t quads_a_turn(uint32_t width) {
  return width < kWarp ? width : 2 * width;
}

// The quads of a row that a thread takes: from `first` on, `stride` apart, none above `last`.
struct Walk {
  uint32_t first, stride, last;
};

__device__ __forceinline__ uint32_t last_quad(uint64_t elements) {
  return uint32_t((elements - 1) / kQuad);
}

__device__ __forceinline__ uint32_t quad_of_thread() {
  const uint32_t lane = threadIdx.x % kWarp;
  return 2 * (threadIdx.x - lane) + lane;
}

// The turns of a row dealt out over the grid's x axis.
__device__ __forceinline__ Walk walk_of_grid(uint64_t elements) {
  const uint32_t turn = quads_a_turn(blockDim.x);
  return {blockIdx.x * turn + quad_of_thread(), gridDim.x * turn, last_quad(elements)};
}

// The rows dealt out over the grid's y axis and a block's.
template <class Body>
__device__ __forceinline__ void each_row(uint64_t rows, const Body& body) {
  const uint64_t stride = uint64_t(gridDim.y) * blockDim.y;
  for (uint64_t row = uint64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += stride)
    body(row);
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// body(Count<n>, quad): n = 2 stands for quad and quad + kWarp. Quads may run to 2^32 - 1.
template <class Body>
__device__ __forceinline__ void each_turn(Walk walk, const Body& body) {
  if (walk.first > walk.last) return;
  uint32_t quad = walk.first;
  for (;;) {
    const uint32_t left = walk.last - quad;
    if (left >= kWarp)
      body(Count<2>{}, quad);
    else
      body(Count<1>{}, quad);
    if (left < walk.stride) return;
    quad += walk.stride;
  }
}

// Quads in registers; 128 bits of fp32, 64 of half precision.
template <class T>
struct alignas(kQuad * sizeof(T)) Four {
  T v[kQuad];
};
using Quad = Four<float>;

// Quad `quad + ahead` of a row; kVector: rows are whole quads at aligned addresses. `ahead` stands
// alone so that it becomes part of the instruction.
template <bool kVector, class T>
__device__ __forceinline__ Four<T> load(const T* row, uint32_t quad, uint32_t ahead,
                                        uint64_t elements) {
  if (kVector) return (reinterpret_cast<const Four<T>*>(row) + quad)[ahead];
  Four<T> four = {};
  const uint64_t first = (uint64_t(quad) + ahead) * kQuad;
  for (uint32_t i = 0; i < kQuad; ++i)
    if (first + i < elements) four.v[i] = row[first + i];
  return four;
}

template <bool kVector, class T>
__device__ __forceinline__ void store(T* row, uint32_t quad, uint32_t ahead, uint64_t elements,
                                      const Four<T>& four) {
  if (kVector) {
    (reinterpret_cast<Four<T>*>(row) + quad)[ahead] = four;
    return;
  }
  const uint64_t first = (uint64_t(quad) + ahead) * kQuad;
  for (uint32_t i = 0; i < kQuad; ++i)
    if (first + i < elements) row[first + i] = four.v[i];
}

__device__ __forceinline__ Quad to_float(const Quad& four) { return four; }
template <class Half>
__device__ __forceinline__ Quad to_float(const Four<Half>& four) {
  return {{to_float(four.v[0]), to_float(four.v[1]), to_float(four.v[2]), to_float(four.v[3])}};
}

template <class T>
__device__ __forceinline__ Four<T> from_float(const Quad& quad) {
  return {{T::from(quad.v[0]), T::from(quad.v[1]), T::from(quad.v[2]), T::from(quad.v[3])}};
}
template <>
__device__ __forceinline__ Quad from_float<float>(const Quad& quad) {
  return quad;
}

struct NormalQuads {
  static __device__ __forceinline__ Quad of(const Words& words) {
    Quad z;
#ifdef SK_PACKED
    Pair even, odd;
    box_muller<Pair>(BitPair(words.w[0], words.w[2]), BitPair(words.w[1], words.w[3]), even, odd);
    z = {{even.a, odd.a, even.b, odd.b}};
#else
    box_muller<float>(words.w[0], words.w[1], z.v[0], z.v[1]);
    box_muller<float>(words.w[2], words.w[3], z.v[2], z.v[3]);
#endif
    return z;
  }
};

struct RademacherQuads {
  static __device__ __forceinline__ Quad of(const Words& words) {
    Quad v;
    for (uint32_t i = 0; i < kQuad; ++i) v.v[i] = rademacher<float>(words.w[i]);
    return v;
  }
};

struct UniformQuads {
  static __device__ __forceinline__ Quad of(const Words& words) {
    Quad u;
    for (uint32_t i = 0; i < kQuad; ++i) u.v[i] = uniform<float>(words.w[i]);
    return u;
  }
};

}  // namespace
}  // namespace sk

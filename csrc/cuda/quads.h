// What a thread works on. A quad is the four elements of one Philox block; rows are samples.
//
// A block of kThreads threads is `width` threads along a row by kThreads / width rows, both powers
// of two. Along a row a thread takes two quads an iteration, 32 quads apart, so that a warp reads
// and writes whole lines and the second quad is at a fixed distance; rows of fewer than 33 quads
// are covered by one quad a thread. The grid's y axis runs over rows, so that no index is divided.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../args.h"
#include "../half.h"
#include "pair.h"

namespace sk {
namespace {

constexpr uint32_t kThreads = 256, kWarp = 32, kQuad = 4;

// Quads of a row that `width` threads cover in an iteration.
__host__ __device__ __forceinline__ uint32_t quads_per_iteration(uint32_t width) {
  return width < kWarp ? width : 2 * width;
}

// The quads of a row that a thread takes: from `first` on, `stride` apart, none above `last`.
struct Range {
  uint32_t first, stride, last;
};

__device__ __forceinline__ uint32_t last_quad(uint64_t elements) {
  return uint32_t((elements - 1) / kQuad);
}

__device__ __forceinline__ uint32_t quad_of_thread() {
  const uint32_t lane = threadIdx.x % kWarp;
  return 2 * (threadIdx.x - lane) + lane;
}

// The iterations of a row dealt out over the grid's x axis.
__device__ __forceinline__ Range range_of_grid(uint64_t elements) {
  const uint32_t quads = quads_per_iteration(blockDim.x);
  return {blockIdx.x * quads + quad_of_thread(), gridDim.x * quads, last_quad(elements)};
}

// A row of a batch and the counter of its first block. A loop over the row counts quads from the
// first of its sample, so that one number is both the block and the address.
struct Place {
  uint64_t row, elements;
  Counter counter;

  __device__ __forceinline__ Place(const NoiseKey& key, uint64_t row, uint64_t elements)
      : row(row), elements(elements), counter(counter_of(key, row, elements)) {}

  __device__ __forceinline__ uint64_t first() const { return uint64_t(counter.block) * kQuad; }
  __device__ __forceinline__ uint64_t end() const { return first() + elements; }
  // A coefficient of the row; NaN where its address is out of range.
  __device__ __forceinline__ float checked(float value) const {
    return counter.in_range ? value : NAN;
  }
};

// The rows dealt out over the grid's y axis and a block's.
template <class Body>
__device__ __forceinline__ void each_row(uint64_t rows, const Body& body) {
  const uint64_t stride = uint64_t(gridDim.y) * blockDim.y;
  for (uint64_t row = uint64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += stride)
    body(row);
}

// Quad `quad + ahead` of a row. `ahead` stands alone so that it becomes part of the instruction.
struct At {
  uint32_t quad, ahead;

  __device__ __forceinline__ uint32_t block() const { return quad + ahead; }
  __device__ __forceinline__ uint64_t element() const { return (uint64_t(quad) + ahead) * kQuad; }
};

template <int kCount, class Load, class Body>
__device__ __forceinline__ void iterate(uint32_t quad, const Load& load, const Body& body) {
  decltype(load(At{})) loaded[kCount];
  // An array indexed by a loop that is not unrolled would lie in local memory.
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) loaded[i] = load(At{quad, i * kWarp});
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) body(At{quad, i * kWarp}, loaded[i]);
}

// body(at, load(at)) for the quads of a range of a row. All that an iteration loads comes before
// its first body, which may write where another loads. Quads may run to 2^32 - 1.
template <class Load, class Body>
__device__ __forceinline__ void each_quad(const Place& place, const Range& range, const Load& load,
                                          const Body& body) {
  if (range.first > range.last) return;
  uint32_t quad = range.first + place.counter.block;
  const uint32_t last = range.last + place.counter.block;
  for (;;) {
    const uint32_t left = last - quad;
    if (left >= kWarp)
      iterate<2>(quad, load, body);
    else
      iterate<1>(quad, load, body);
    if (left < range.stride) return;
    quad += range.stride;
  }
}

// Quads in registers; 128 bits of fp32, 64 of half precision.
template <class T>
struct alignas(kQuad * sizeof(T)) Four {
  T v[kQuad];
};
using Quad = Four<float>;

// The elements of a row; kVector: rows are whole quads at aligned addresses.
template <bool kVector, class T>
struct Row {
  using Quad = Four<std::remove_const_t<T>>;

  // Where the sample's first element would be.
  T* start;
  uint64_t end;

  __device__ __forceinline__ Row(T* batch, const Place& place)
      : start(batch + (place.row * place.elements - place.first())), end(place.end()) {}

  __device__ __forceinline__ Quad load(At at) const {
    if (kVector) return (reinterpret_cast<const Quad*>(start) + at.quad)[at.ahead];
    Quad four = {};
    for (uint32_t i = 0; i < kQuad; ++i)
      if (at.element() + i < end) four.v[i] = start[at.element() + i];
    return four;
  }
  __device__ __forceinline__ void store(At at, const Quad& four) const {
    if constexpr (kVector) {
      (reinterpret_cast<Quad*>(start) + at.quad)[at.ahead] = four;
    } else {
      for (uint32_t i = 0; i < kQuad; ++i)
        if (at.element() + i < end) start[at.element() + i] = four.v[i];
    }
  }
};

template <class T>
__device__ __forceinline__ Quad to_floats(const Four<T>& four) {
  return {{to_float(four.v[0]), to_float(four.v[1]), to_float(four.v[2]), to_float(four.v[3])}};
}

template <class T>
__device__ __forceinline__ Four<T> from_floats(const Quad& quad) {
  return {{from_float<T>(quad.v[0]), from_float<T>(quad.v[1]), from_float<T>(quad.v[2]),
           from_float<T>(quad.v[3])}};
}

// The values of a block.
template <class Map>
__device__ __forceinline__ Quad values_of(const Words& words) {
  Quad v;
#ifdef SK_PACKED
  const auto& [w] = words;
  if constexpr (std::is_same_v<Map, NormalMap>) {
    Pair even, odd;
    box_muller<Pair>(BitPair(w[0], w[2]), BitPair(w[1], w[3]), even, odd);
    return {{even.a, odd.a, even.b, odd.b}};
  }
#endif
  map_words<Map>(words, v.v);
  return v;
}

}  // namespace
}  // namespace sk

// A tile of a score in fp32: fp32 scores are read in place, half-precision ones are converted,
// exactly, into a buffer. And normals that are made while the tile is prefetched.
#pragma once

#include "../half.h"
#include "tile.h"

namespace sk {
namespace {

template <class Half>
SK_INLINE const float* convert_tile(const void* score, const Tile& tile, float* buffer) {
  const Half* half = static_cast<const Half*>(score) + tile.offset;
  for (uint64_t i = 0; i < tile.count; ++i) buffer[i] = to_float(half[i]);
  return buffer;
}

SK_INLINE const float* score_tile(const void* score, Dtype dtype, const Tile& tile, float* buffer) {
  if (dtype == Dtype::kBFloat16) return convert_tile<BFloat16>(score, tile, buffer);
  if (dtype == Dtype::kFloat16) return convert_tile<Float16>(score, tile, buffer);
  return static_cast<const float*>(score) + tile.offset;
}

// What a kernel reads or writes in a tile, elements of `size` bytes, or null.
template <bool kWrite>
struct Stream {
  const char* start;
  uint64_t size;

  SK_INLINE void prefetch(uint64_t first, uint64_t count) const {
    constexpr uint64_t kLine = 64;
    if (!start) return;
    for (uint64_t i = 0; i < count * size; i += kLine)
      __builtin_prefetch(start + first * size + i, kWrite);
  }
};

SK_INLINE Stream<false> read(const void* p, const Tile& tile, Dtype dtype = Dtype::kFloat32) {
  const uint64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  return {p ? static_cast<const char*>(p) + tile.offset * size : nullptr, size};
}
SK_INLINE Stream<true> written(const float* p, const Tile& tile) {
  return {p ? reinterpret_cast<const char*>(p + tile.offset) : nullptr, sizeof(float)};
}

template <class... Streams>
SK_INLINE void fill_normals(float* z, const NoiseKey& key, uint64_t elements, const Tile& tile,
                            const Streams&... streams) {
  fill_tile<NormalMap>(z, key, elements, tile,
                       [=](uint64_t first, uint64_t count)
                           SK_LAMBDA_INLINE { (streams.prefetch(first, count), ...); });
}

}  // namespace
}  // namespace sk

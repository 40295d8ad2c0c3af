// A tile of a score in fp32: fp32 scores are read in place, half-precision ones are converted,
// exactly, into a buffer.
#pragma once

#include "../half.h"
#include "tile.h"

namespace sk {
namespace {

SK_INLINE uint64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

SK_INLINE const char* score_at(const void* score, Dtype dtype, const Tile& tile) {
  return static_cast<const char*>(score) + tile.offset * size_of(dtype);
}

SK_INLINE const float* score_tile(const void* score, Dtype dtype, const Tile& tile, float* buffer) {
  const char* p = score_at(score, dtype, tile);
  if (dtype == Dtype::kFloat32) return reinterpret_cast<const float*>(p);
  const uint16_t* half = reinterpret_cast<const uint16_t*>(p);
  if (dtype == Dtype::kBFloat16)
    for (uint64_t i = 0; i < tile.count; ++i) buffer[i] = from_bfloat16(half[i]);
  else
    for (uint64_t i = 0; i < tile.count; ++i) buffer[i] = from_float16(half[i]);
  return buffer;
}

}  // namespace
}  // namespace sk

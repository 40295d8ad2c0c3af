// A tile of a score in fp32: fp32 scores are read in place, half-precision ones are converted,
// exactly, into a buffer.
#pragma once

#include "tile.h"

namespace sk {
namespace {

SK_INLINE float from_bfloat16(uint16_t h) { return from_bits(uint32_t(h) << 16); }

// By integers, so that subnormals survive whatever the processor does with its own.
SK_INLINE float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = to_bits(float(int32_t(magnitude)) * 0x1p-24f);
  return from_bits(sign | (magnitude < 0x0400u ? subnormal : normal));
}

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

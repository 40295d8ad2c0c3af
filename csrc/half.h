// Half precision: to fp32 exactly, from fp32 to nearest, ties to even.
#pragma once

#include "noise.h"

namespace sk {

SK_INLINE float from_bfloat16(uint16_t h) { return from_bits(uint32_t(h) << 16); }

// By integers, so that subnormals survive whatever the processor does with its own.
SK_INLINE float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = to_bits(float(int32_t(magnitude)) * 0x1p-24f);
  return from_bits(sign | (magnitude < 0x0400u ? subnormal : normal));
}

SK_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

SK_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (x != x) return uint16_t(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);
  // Below 2^-14 the unit is 2^-24: adding 1/2 leaves the rounded number of units in the low bits.
  if (magnitude < 0x38800000u)
    return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) & 0xFFFFu));
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13));
}

}  // namespace sk

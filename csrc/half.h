// Half-precision scores to fp32, exactly.
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

}  // namespace sk

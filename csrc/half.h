// Half precision: to fp32 exactly, from fp32 to nearest, ties to even. On a GPU an instruction.
#pragma once

#include "noise.h"

namespace sk {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SK_INLINE float to_float(float x) { return x; }

SK_INLINE float to_float(BFloat16 h) { return from_bits(uint32_t(h.bits) << 16); }

// By integers, so that subnormals survive whatever the processor does with its own.
SK_INLINE float to_float(Float16 h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
#else
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7FFFu;
  const uint32_t rebias = magnitude >= 0x7C00u ? 224u << 23 : 112u << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  const uint32_t subnormal = to_bits(float(int32_t(magnitude)) * 0x1p-24f);
  return from_bits(sign | (magnitude < 0x0400u ? subnormal : normal));
#endif
}

// T is float, BFloat16 or Float16.
template <class T>
SK_INLINE T from_float(float x) {
  return x;
}

template <>
SK_INLINE BFloat16 from_float(float x) {
#ifdef __CUDA_ARCH__
  BFloat16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
#else
  const uint32_t bits = to_bits(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
SK_INLINE Float16 from_float(float x) {
#ifdef __CUDA_ARCH__
  Float16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
#else
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = bits >> 16 & 0x8000u;
  if (x != x) return {uint16_t(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {uint16_t(sign | 0x7C00u)};
  // Below 2^-14 the unit is 2^-24: adding 1/2 leaves the rounded number of units in the low bits.
  if (magnitude < 0x38800000u)
    return {uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) & 0xFFFFu))};
  return {uint16_t(sign | ((magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13))};
#endif
}

}  // namespace sk

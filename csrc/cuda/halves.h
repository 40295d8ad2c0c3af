// Half-precision elements on a GPU, where a conversion is one instruction.
#pragma once

#include <cuda_runtime.h>

#include "../half.h"

namespace sk {

struct BFloat16 {
  uint16_t bits;

  static __device__ __forceinline__ BFloat16 from(float x) {
#ifdef __CUDA_ARCH__
    BFloat16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
    return h;
#else
    return {to_bfloat16(x)};
#endif
  }
};

struct Float16 {
  uint16_t bits;

  static __device__ __forceinline__ Float16 from(float x) {
#ifdef __CUDA_ARCH__
    Float16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
    return h;
#else
    return {to_float16(x)};
#endif
  }
};

__device__ __forceinline__ float to_float(BFloat16 h) { return from_bfloat16(h.bits); }

__device__ __forceinline__ float to_float(Float16 h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
#else
  return from_float16(h.bits);
#endif
}

}  // namespace sk

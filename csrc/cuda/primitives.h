// noise.h's primitives on a GPU: the correctly rounded root, and pairs of floats that sm_100 handles
// in one instruction. Every operation rounds as IEEE says, so the bits are those of every backend.
#pragma once

#include <cuda_runtime.h>

#include "../half.h"
#include "../noise.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define SK_PACKED 1
#endif

namespace sk {

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float reciprocal_root_seed(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// sqrt(x) of a normal x above zero. On a GPU this is what nvcc makes of sqrt.rn, less the branch for
// the radicands that noise.h never has: a seed and one Markstein step, correctly rounded.
__device__ __forceinline__ float device_root(float x) {
#ifdef __CUDA_ARCH__
  const float y = reciprocal_root_seed(x);
  const float g = x * y, h = 0.5f * y;
  return fma(fma(-g, g, x), h, g);
#else
  return square_root(x);
#endif
}

// The scalar that noise.h's maths is instantiated with on a GPU.
struct Float {
  float v;
  Float() = default;
  __device__ __forceinline__ Float(float x) : v(x) {}
};

__device__ __forceinline__ Float operator*(Float a, Float b) { return a.v * b.v; }
__device__ __forceinline__ Float operator-(Float a, Float b) { return a.v - b.v; }
__device__ __forceinline__ Float fma(Float a, Float b, Float c) { return fma(a.v, b.v, c.v); }
__device__ __forceinline__ Float square_root(Float x) { return device_root(x.v); }

// Two floats that sm_100 adds, multiplies and fuses in one instruction. Elsewhere, and in tests on
// a CPU, the same operations one after the other: every one rounds by itself, so the bits agree.
#pragma once

#include <cuda_runtime.h>

#include "../noise.h"

namespace sk {

template <class T>
struct Two {
  T a, b;
  Two() = default;
  __device__ __forceinline__ Two(T both) : a(both), b(both) {}
  __device__ __forceinline__ Two(T a, T b) : a(a), b(b) {}
};
using Pair = Two<float>;
using BitPair = Two<uint32_t>;

#define SK_BITWISE(op)                                                   \
  __device__ __forceinline__ BitPair operator op(BitPair x, BitPair y) { \
    return {x.a op y.a, x.b op y.b};                                     \
  }
SK_BITWISE(+)
SK_BITWISE(-)
SK_BITWISE(&)
SK_BITWISE(|)
SK_BITWISE(^)
#undef SK_BITWISE

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define SK_PACKED 1

#define SK_PACKED_OPERATOR(op, instruction)                                          \
  __device__ __forceinline__ Pair operator op(Pair x, Pair y) {                      \
    Pair r;                                                                          \
    asm("{.reg .b64 x, y, r; mov.b64 x, {%2, %3}; mov.b64 y, {%4, %5}; " instruction \
        " r, x, y; mov.b64 {%0, %1}, r;}"                                            \
        : "=f"(r.a), "=f"(r.b)                                                       \
        : "f"(x.a), "f"(x.b), "f"(y.a), "f"(y.b));                                   \
    return r;                                                                        \
  }
SK_PACKED_OPERATOR(+, "add.rn.f32x2")
SK_PACKED_OPERATOR(*, "mul.rn.f32x2")
#undef SK_PACKED_OPERATOR
__device__ __forceinline__ Pair fma(Pair x, Pair y, Pair z) {
  Pair r;
  asm("{.reg .b64 x, y, z, r; mov.b64 x, {%2, %3}; mov.b64 y, {%4, %5}; mov.b64 z, {%6, %7};"
      " fma.rn.f32x2 r, x, y, z; mov.b64 {%0, %1}, r;}"
      : "=f"(r.a), "=f"(r.b)
      : "f"(x.a), "f"(x.b), "f"(y.a), "f"(y.b), "f"(z.a), "f"(z.b));
  return r;
}

#else

__device__ __forceinline__ Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
__device__ __forceinline__ Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
__device__ __forceinline__ Pair fma(Pair x, Pair y, Pair z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}

#endif

__device__ __forceinline__ Pair operator-(Pair x, Pair y) { return x + Pair(-y.a, -y.b); }

__device__ __forceinline__ Pair from_unsigned(BitPair w) {
  return {from_unsigned(w.a), from_unsigned(w.b)};
}
__device__ __forceinline__ Pair from_signed(BitPair w) {
  return {from_signed(w.a), from_signed(w.b)};
}
__device__ __forceinline__ Pair from_bits(BitPair w) { return {from_bits(w.a), from_bits(w.b)}; }
__device__ __forceinline__ BitPair to_bits(Pair x) { return {to_bits(x.a), to_bits(x.b)}; }

// The root of sqrt.rn, as noise.h's of one float, with its products packed.
__device__ __forceinline__ Pair square_root(Pair x) {
#ifdef __CUDA_ARCH__
  Pair y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y.a) : "f"(x.a));
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y.b) : "f"(x.b));
  const Pair g = x * y, h = Pair(0.5f) * y;
  return fma(fma(Pair(-g.a, -g.b), g, x), h, g);
#else
  return {square_root(x.a), square_root(x.b)};
#endif
}

}  // namespace sk

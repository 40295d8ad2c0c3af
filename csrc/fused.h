// The number type that fused scores are written in, F: on a CPU a vector of floats, one lane a row;
// on a GPU a float, one thread a row. A score is
//
//   template <class F> void score(const F* x, F sigma, F* s, const float* params)
//
// from the row's elements x to its score s. F has the operators and functions below, also with
// plain numbers. On x86-64 exp, tanh and their like are glibc's vector library's, within 4 units in
// the last place; on a GPU they are CUDA's.
#pragma once

#if defined(__CUDACC__) || defined(SK_FUSED_GPU)
#include "fused_gpu.h"
#define SK_FUSED_LANES 1
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define SK_FUSED inline
#define SK_UNROLL(count) SK_PRAGMA(GCC unroll count)
#if defined(__AVX512F__)
#define SK_FUSED_LANES 16
#elif defined(__AVX2__)
#define SK_FUSED_LANES 8
#else
#define SK_FUSED_LANES 4
#endif
#endif

#define SK_PRAGMA(text) _Pragma(#text)

namespace sk {
namespace fused {

constexpr int kLanes = SK_FUSED_LANES;
#if SK_FUSED_LANES == 1
typedef float Floats;
typedef int32_t Integers;
#else
typedef float Floats __attribute__((vector_size(4 * SK_FUSED_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * SK_FUSED_LANES)));
#endif

struct F {
  Floats v;
  F() = default;
  SK_FUSED F(Floats v) : v(v) {}
  template <class Number, class = decltype(float(Number()))>
  SK_FUSED F(Number x) : v(float(x) - Floats{}) {}
};

// What a comparison gives: of vectors all bits of a lane, or none.
struct Mask {
  Integers v;
};

#define SK_OPERATOR(op) \
  SK_FUSED F operator op(F a, F b) { return a.v op b.v; }
SK_OPERATOR(+)
SK_OPERATOR(-)
SK_OPERATOR(*)
SK_OPERATOR(/)
#undef SK_OPERATOR
#define SK_COMPARISON(op) \
  SK_FUSED Mask operator op(F a, F b) { return {a.v op b.v}; }
SK_COMPARISON(<)
SK_COMPARISON(<=)
SK_COMPARISON(>)
SK_COMPARISON(>=)
SK_COMPARISON(==)
SK_COMPARISON(!=)
#undef SK_COMPARISON
SK_FUSED Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
SK_FUSED Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
SK_FUSED Mask operator!=(Mask a, Mask b) { return {a.v ^ b.v}; }
SK_FUSED Mask operator!(Mask a) { return {a.v == Integers{}}; }
SK_FUSED F operator-(F a) { return -a.v; }
SK_FUSED F operator+(F a) { return a; }
SK_FUSED F& operator+=(F& a, F b) { return a = a + b; }
SK_FUSED F& operator-=(F& a, F b) { return a = a - b; }
SK_FUSED F& operator*=(F& a, F b) { return a = a * b; }
SK_FUSED F& operator/=(F& a, F b) { return a = a / b; }

SK_FUSED F where(Mask m, F a, F b) { return m.v ? a.v : b.v; }
// NaN where one of them is, as torch's.
SK_FUSED F maximum(F a, F b) { return where(a != a, a, where(a > b, a, b)); }
SK_FUSED F minimum(F a, F b) { return where(a != a, a, where(a < b, a, b)); }

#if SK_FUSED_LANES == 1
template <class Function>
SK_FUSED F each(const Function& function, F a) {
  return function(a.v);
}
SK_FUSED F abs(F a) { return ::fabsf(a.v); }
template <class Function>
SK_FUSED F each(const Function& function, F a, F b) {
  return function(a.v, b.v);
}
SK_FUSED F fma(F a, F b, F c) { return ::fmaf(a.v, b.v, c.v); }
#else
template <class Function>
SK_FUSED F each(const Function& function, F a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = function(a.v[i]);
  return a;
}
SK_FUSED F abs(F a) {
  const Integers bits = (Integers)a.v & 0x7FFFFFFF;
  return (Floats)bits;
}
template <class Function>
SK_FUSED F each(const Function& function, F a, F b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = function(a.v[i], b.v[i]);
  return a;
}
SK_FUSED F fma(F a, F b, F c) {
#if defined(__clang__)
  return __builtin_elementwise_fma(a.v, b.v, c.v);
#elif SK_FUSED_LANES == 16
  return __builtin_ia32_vfmaddps512_mask(a.v, b.v, c.v, -1, 4);
#elif SK_FUSED_LANES == 8
  return __builtin_ia32_vfmaddps256(a.v, b.v, c.v);
#else
  for (int i = 0; i < kLanes; ++i) c.v[i] = ::fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#endif
}
#endif
#define SK_FUNCTION(name, of)                        \
  SK_FUSED F name(F a) {                             \
    return each([](float x) { return ::of(x); }, a); \
  }
SK_FUNCTION(ceil, ceilf)
SK_FUNCTION(floor, floorf)
// To even, as torch's.
SK_FUNCTION(round, rintf)
SK_FUNCTION(sqrt, sqrtf)
SK_FUNCTION(trunc, truncf)
#undef SK_FUNCTION
#define SK_FUNCTION(name)                                                \
  SK_FUSED F name(F a, F b) {                                            \
    return each([](float x, float y) { return ::name##f(x, y); }, a, b); \
  }
SK_FUNCTION(atan2)
SK_FUNCTION(fmod)
SK_FUNCTION(hypot)
SK_FUNCTION(pow)
#undef SK_FUNCTION
// With the sign of b.
SK_FUSED F remainder(F a, F b) {
  const F rest = fmod(a, b);
  return where((rest != F(0)) & ((rest < F(0)) != (b < F(0))), rest + b, rest);
}

// Functions of one number, and glibc's name of the vector's.
#if defined(__x86_64__) && defined(__GLIBC__) && SK_FUSED_LANES > 4
#if __GLIBC_PREREQ(2, 35)
#define SK_VECTOR_LIBRARY
#endif
#endif
#ifdef SK_VECTOR_LIBRARY
#if SK_FUSED_LANES == 16
#define SK_FUNCTION(name)                        \
  extern "C" Floats _ZGVeN16v_##name##f(Floats); \
  inline F name(F a) { return _ZGVeN16v_##name##f(a.v); }
#else
#define SK_FUNCTION(name)                       \
  extern "C" Floats _ZGVdN8v_##name##f(Floats); \
  inline F name(F a) { return _ZGVdN8v_##name##f(a.v); }
#endif
#else
#define SK_FUNCTION(name)                                 \
  SK_FUSED F name(F a) {                                  \
    return each([](float x) { return ::name##f(x); }, a); \
  }
#endif
SK_FUNCTION(acos)
SK_FUNCTION(acosh)
SK_FUNCTION(asin)
SK_FUNCTION(asinh)
SK_FUNCTION(atan)
SK_FUNCTION(atanh)
SK_FUNCTION(cos)
SK_FUNCTION(cosh)
SK_FUNCTION(erf)
SK_FUNCTION(erfc)
SK_FUNCTION(exp)
SK_FUNCTION(exp2)
SK_FUNCTION(expm1)
SK_FUNCTION(log)
SK_FUNCTION(log10)
SK_FUNCTION(log1p)
SK_FUNCTION(log2)
SK_FUNCTION(sin)
SK_FUNCTION(sinh)
SK_FUNCTION(tan)
SK_FUNCTION(tanh)
#undef SK_FUNCTION

// out = x M of a constant matrix [elements, columns], packed: so many columns side by side, padded
// with 0, one element after the other, and then the next columns. As many sums are in registers.
constexpr int kColumns = 8;
template <int kElements, int kOut>
SK_FUSED void product(const F* x, const float* packed, F* out) {
  for (int first = 0; first < kOut; first += kColumns) {
    F sums[kColumns];
    SK_UNROLL(8)
    for (int j = 0; j < kColumns; ++j) sums[j] = 0;
    SK_UNROLL(4)
    for (int k = 0; k < kElements; ++k, packed += kColumns) SK_UNROLL(8)
    for (int j = 0; j < kColumns; ++j) sums[j] = fma(x[k], F(packed[j]), sums[j]);
    SK_UNROLL(8)
    for (int j = 0; j < kColumns; ++j)
      if (first + j < kOut) out[first + j] = sums[j];
  }
}

}  // namespace fused
}  // namespace sk

#ifndef SK_FUSED_SCORE
// The function of a compiled score that the chain calls: groups of kLanes rows, [elements][kLanes]
// each, in place of s.
#define SK_FUSED_SCORE(elements)                                                     \
  extern "C" __attribute__((visibility("default"))) void sk_score(                   \
      const float* x, float sigma, float* s, uint64_t groups, const float* params) { \
    using sk::fused::F;                                                              \
    for (uint64_t g = 0; g < groups; ++g)                                            \
      score(reinterpret_cast<const F*>(x) + g * (elements), F(sigma),                \
            reinterpret_cast<F*>(s) + g * (elements), params);                       \
  }                                                                                  \
  extern "C" int sk_lanes() { return sk::fused::kLanes; }
#endif

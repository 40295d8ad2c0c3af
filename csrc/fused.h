// The number type that fused scores are written in: F, a vector of floats, one lane a row. A score
// is
//
//   template <class F> void score(const F* x, F sigma, F* s, const float* params)
//
// from the row's elements x to its score s. F has the operators and functions below, also with
// plain numbers. exp, tanh and their like are glibc's vector library's on x86-64, within 4 units in
// the last place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define SK_FUSED_LANES 16
#elif defined(__AVX2__)
#define SK_FUSED_LANES 8
#else
#define SK_FUSED_LANES 4
#endif

namespace sk {
namespace fused {

constexpr int kLanes = SK_FUSED_LANES;
typedef float Floats __attribute__((vector_size(4 * SK_FUSED_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * SK_FUSED_LANES)));

struct F {
  Floats v;
  F() = default;
  F(Floats v) : v(v) {}
  template <class Number, class = decltype(float(Number()))>
  F(Number x) : v(float(x) - Floats{}) {}
};

// What a comparison gives: all bits of a lane, or none.
struct Mask {
  Integers v;
};

#define SK_OPERATOR(op) \
  inline F operator op(F a, F b) { return a.v op b.v; }
SK_OPERATOR(+)
SK_OPERATOR(-)
SK_OPERATOR(*)
SK_OPERATOR(/)
#undef SK_OPERATOR
#define SK_COMPARISON(op) \
  inline Mask operator op(F a, F b) { return {a.v op b.v}; }
SK_COMPARISON(<)
SK_COMPARISON(<=)
SK_COMPARISON(>)
SK_COMPARISON(>=)
SK_COMPARISON(==)
SK_COMPARISON(!=)
#undef SK_COMPARISON
inline Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
inline Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
inline Mask operator!(Mask a) { return {~a.v}; }
inline F operator-(F a) { return -a.v; }
inline F operator+(F a) { return a; }
inline F& operator+=(F& a, F b) { return a = a + b; }
inline F& operator-=(F& a, F b) { return a = a - b; }
inline F& operator*=(F& a, F b) { return a = a * b; }
inline F& operator/=(F& a, F b) { return a = a / b; }

inline F where(Mask m, F a, F b) { return m.v ? a.v : b.v; }
// NaN where one of them is, as torch's.
inline F maximum(F a, F b) { return where(a != a, a, where(a > b, a, b)); }
inline F minimum(F a, F b) { return where(a != a, a, where(a < b, a, b)); }
inline F abs(F a) {
  const Integers bits = (Integers)a.v & 0x7FFFFFFF;
  return (Floats)bits;
}

template <class Function>
inline F each(const Function& function, F a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = function(a.v[i]);
  return a;
}
inline F sqrt(F a) {
  return each([](float x) { return ::sqrtf(x); }, a);
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
  inline F name(F a) {                                    \
    return each([](float x) { return ::name##f(x); }, a); \
  }
#endif
SK_FUNCTION(atan)
SK_FUNCTION(cos)
SK_FUNCTION(cosh)
SK_FUNCTION(erf)
SK_FUNCTION(erfc)
SK_FUNCTION(exp)
SK_FUNCTION(exp2)
SK_FUNCTION(expm1)
SK_FUNCTION(log)
SK_FUNCTION(log1p)
SK_FUNCTION(log2)
SK_FUNCTION(sin)
SK_FUNCTION(sinh)
SK_FUNCTION(tan)
SK_FUNCTION(tanh)
#undef SK_FUNCTION
inline F pow(F a, F b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = ::powf(a.v[i], b.v[i]);
  return a;
}

}  // namespace fused
}  // namespace sk

// The function of a compiled score that the chain calls: groups of kLanes rows, [elements][kLanes]
// each, in place of s.
#define SK_FUSED_SCORE(elements)                                                   \
  extern "C" void sk_score(const float* x, float sigma, float* s, uint64_t groups, \
                           const float* params) {                                  \
    using sk::fused::F;                                                            \
    for (uint64_t g = 0; g < groups; ++g)                                          \
      score(reinterpret_cast<const F*>(x) + g * (elements), F(sigma),              \
            reinterpret_cast<F*>(s) + g * (elements), params);                     \
  }                                                                                \
  extern "C" int sk_lanes() { return sk::fused::kLanes; }

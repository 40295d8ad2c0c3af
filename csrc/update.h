// The affine step every sampler is made of, x <- a x + b score + c z, as one chain of fma: with
// the noise of noise.h, whole chains then agree to the bit wherever the scores do. Without noise
// (c = 0) none is added: a product with 0 could change the sign of a zero.
#pragma once

#include "noise.h"

namespace sk {

template <class F>
SK_INLINE F affine(F a, F x, F b, F score) {
  return fma(b, score, a * x);
}

template <class F>
SK_INLINE F affine(F a, F x, F b, F score, F c, F z) {
  return fma(c, z, affine(a, x, b, score));
}

// Of a preconditioner: 0 where the root of a GPU would be inexact or NaN.
SK_INLINE float gain_root(float g) { return g < 0x1p-100f ? 0.0f : square_root(g); }

// The last operation of a step: x limited to [low, high]; or wrapped into [0, high), low = 1 /
// high.
enum class End : int { kNone = 0, kClamp = 1, kWrap = 2 };

// NaN stays: in this order an instruction each.
SK_INLINE float clamped(float x, float low, float high) {
  const float above = low > x ? low : x;
  return high < above ? high : above;
}

// Where x is next to a multiple of the period the quotient may be off by one: the result is then 0
// or the last number below the period, which is as near.
SK_INLINE float wrapped(float x, float inverse, float period) {
  const float rest = fma(-::floorf(x * inverse), period, x);
  return clamped(rest, 0.0f, period * 0x1.fffffep-1f);
}

SK_INLINE float ended(End end, float x, float low, float high) {
  if (end == End::kNone) return x;
  return end == End::kClamp ? clamped(x, low, high) : wrapped(x, low, high);
}

// A line of a table.
struct Coefficients {
  float a, b, c, scale, noise_scale;
};

SK_INLINE Coefficients read_line(const float* line, bool known) {
  return {line[0], line[1], line[2], known ? line[3] : 0.0f, known ? line[4] : 0.0f};
}

SK_INLINE bool has_noise(const Coefficients& k) { return k.c != 0.0f || k.noise_scale != 0.0f; }

}  // namespace sk

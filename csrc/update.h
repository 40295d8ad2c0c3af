// The affine step every sampler is made of, x <- a x + b score + c z, as one chain of fma: with
// the noise of noise.h, whole chains then agree to the bit wherever the scores do.
#pragma once

#include "noise.h"

namespace sk {

SK_INLINE float affine(float a, float x, float b, float score) { return fma(b, score, a * x); }

SK_INLINE float affine(float a, float x, float b, float score, float c, float z) {
  return fma(c, z, affine(a, x, b, score));
}

}  // namespace sk

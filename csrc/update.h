// The affine step every sampler is made of, x <- a x + b score + c z, as one chain of fma: with
// the noise of noise.h, whole chains then agree to the bit wherever the scores do.
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

}  // namespace sk

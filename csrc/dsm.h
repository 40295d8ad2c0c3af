// Denoising score matching, per element: the residual of 1/2 w sum (sigma score + z)^2 and its
// derivative by the score. 1/sigma^2 is never formed.
#pragma once

#include "noise.h"

namespace sk {

template <class F>
SK_INLINE F perturbed(F x, F sigma, F z) {
  return fma(sigma, z, x);
}

template <class F>
SK_INLINE F dsm_residual(F score, F sigma, F z) {
  return fma(sigma, score, z);
}

}  // namespace sk

// Sliced score matching: which sums over a probe there are, and central differences.
#pragma once

#include "args.h"

namespace sk {

// v.v, v.a, v.b and a.a.
enum ProbeSum { kVV, kVA, kVB, kAA, kProbeSums };

SK_INLINE float mean_of(float above, float below) { return 0.5f * (above + below); }

SK_INLINE float shifted(float x, float step, float v) { return fma(step, v, x); }

}  // namespace sk

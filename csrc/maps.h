// The four words of a Philox block -> its four values. F is float or a vector of floats, U its
// bits.
#pragma once

#include "noise.h"

namespace sk {

struct WordMap {
  template <class F, class U>
  static SK_INLINE void apply(U w0, U w1, U w2, U w3, F* v) {
    v[0] = from_bits(w0), v[1] = from_bits(w1), v[2] = from_bits(w2), v[3] = from_bits(w3);
  }
};

struct NormalMap {
  template <class F, class U>
  static SK_INLINE void apply(U w0, U w1, U w2, U w3, F* v) {
    box_muller(w0, w1, v[0], v[1]);
    box_muller(w2, w3, v[2], v[3]);
  }
};

struct UniformMap {
  template <class F, class U>
  static SK_INLINE void apply(U w0, U w1, U w2, U w3, F* v) {
    v[0] = uniform<F>(w0), v[1] = uniform<F>(w1), v[2] = uniform<F>(w2), v[3] = uniform<F>(w3);
  }
};

struct RademacherMap {
  template <class F, class U>
  static SK_INLINE void apply(U w0, U w1, U w2, U w3, F* v) {
    v[0] = rademacher<F>(w0), v[1] = rademacher<F>(w1);
    v[2] = rademacher<F>(w2), v[3] = rademacher<F>(w3);
  }
};

}  // namespace sk

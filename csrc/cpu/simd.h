// The vector types of an instruction set, F (fp32 lanes) and U (uint32 lanes), with the primitives
// that csrc/noise.h is written in, and the few shuffles that fill.h needs.
//
// Philox multiplies 32 x 32 -> 64 bits, which vectors do for every second lane. A Philox word of
// kLanes counters is therefore held as two registers of 64-bit lanes whose low halves count and
// whose high halves hold rubbish: `even` for the even 32-bit lanes, `odd` for the odd ones.
#pragma once

#include "../noise.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define SK_VECTOR 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define SK_VECTOR 8
#elif defined(SK_NEON)
#include <arm_neon.h>
#define SK_VECTOR 4
#endif

#define SK_LAMBDA_INLINE __attribute__((always_inline))

namespace sk {

#ifdef SK_VECTOR

// What compilers do on vectors of any instruction set.
struct AnyVector {
  static constexpr int kLanes = SK_VECTOR;
  typedef uint32_t Integers __attribute__((vector_size(4 * SK_VECTOR)));
  typedef float Floats __attribute__((vector_size(4 * SK_VECTOR)));

  struct U {
    Integers v;
    SK_INLINE explicit U(Integers x) : v(x) {}
    SK_INLINE explicit U(uint32_t x) : v(x - Integers{}) {}
    friend SK_INLINE U operator+(U a, U b) { return U(a.v + b.v); }
    friend SK_INLINE U operator-(U a, U b) { return U(a.v - b.v); }
    friend SK_INLINE U operator&(U a, U b) { return U(a.v & b.v); }
    friend SK_INLINE U operator|(U a, U b) { return U(a.v | b.v); }
    friend SK_INLINE U operator^(U a, U b) { return U(a.v ^ b.v); }
  };

  struct F {
    Floats v;
    F() = default;
    SK_INLINE explicit F(Floats x) : v(x) {}
    SK_INLINE explicit F(float x) : v(x - Floats{}) {}
    friend SK_INLINE F operator*(F a, F b) { return F(a.v * b.v); }
    friend SK_INLINE F operator-(F a, F b) { return F(a.v - b.v); }
    friend SK_INLINE U to_bits(F a) { return U((Integers)a.v); }
  };
  friend SK_INLINE F from_bits(U a) { return F((Floats)a.v); }

  static SK_INLINE U load(const uint32_t* p) {
    Integers v;
    memcpy(&v, p, sizeof v);
    return U(v);
  }
  static SK_INLINE F load(const float* p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return F(v);
  }
  static SK_INLINE void store(float* p, F a) { memcpy(p, &a.v, sizeof a.v); }
};

#endif

#if defined(__AVX512F__)

struct IsaVector : AnyVector {
  static constexpr int kRegisters = 32;

  // 64-bit lanes: low * low, the high half moved down, a ^ b ^ c.
  using Wide = __m512i;
  static SK_INLINE Wide wide(uint32_t x) { return _mm512_set1_epi64(x); }
  static SK_INLINE Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
  static SK_INLINE Wide high(Wide a) { return _mm512_srli_epi64(a, 32); }
  static SK_INLINE Wide exclusive(Wide a, Wide b, Wide c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0x96);
  }
  static SK_INLINE Wide even(U a) { return (Wide)a.v; }
  static SK_INLINE Wide odd(U a) { return high(even(a)); }
  // The 32-bit lanes back from the low (or the high) halves of an even and an odd register.
  static SK_INLINE U join_low(Wide a, Wide b) {
    return U((Integers)_mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CCAA));
  }
  static SK_INLINE U join_high(Wide a, Wide b) {
    return U((Integers)_mm512_mask_shuffle_epi32(b, 0x5555, a, _MM_PERM_DDBB));
  }

  // Within every 128 bits: a0 b0 a1 b1, a2 b2 a3 b3, a0 a1 b0 b1 and a2 a3 b2 b3.
  static SK_INLINE F zip_low(F a, F b) { return F(_mm512_unpacklo_ps(a.v, b.v)); }
  static SK_INLINE F zip_high(F a, F b) { return F(_mm512_unpackhi_ps(a.v, b.v)); }
  static SK_INLINE F low_halves(F a, F b) { return F(_mm512_shuffle_ps(a.v, b.v, 0x44)); }
  static SK_INLINE F high_halves(F a, F b) { return F(_mm512_shuffle_ps(a.v, b.v, 0xEE)); }
  // The first, third, ... 64 bits, and then the others.
  static SK_INLINE F deal_pairs(F a) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return F((Floats)_mm512_permutexvar_epi64(order, (__m512i)a.v));
  }
};

SK_INLINE AnyVector::F fma(AnyVector::F a, AnyVector::F b, AnyVector::F c) {
  return AnyVector::F(_mm512_fmadd_ps(a.v, b.v, c.v));
}
SK_INLINE AnyVector::F square_root(AnyVector::F a) { return AnyVector::F(_mm512_sqrt_ps(a.v)); }
SK_INLINE AnyVector::F from_signed(AnyVector::U a) {
  return AnyVector::F(_mm512_cvtepi32_ps((__m512i)a.v));
}
SK_INLINE AnyVector::F from_unsigned(AnyVector::U a) {
  return AnyVector::F(_mm512_cvtepu32_ps((__m512i)a.v));
}

#elif defined(__AVX2__)

struct IsaVector : AnyVector {
  static constexpr int kRegisters = 16;

  using Wide = __m256i;
  static SK_INLINE Wide wide(uint32_t x) { return _mm256_set1_epi64x(x); }
  static SK_INLINE Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
  static SK_INLINE Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
  static SK_INLINE Wide exclusive(Wide a, Wide b, Wide c) {
    return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
  }
  static SK_INLINE Wide even(U a) { return (Wide)a.v; }
  static SK_INLINE Wide odd(U a) { return high(even(a)); }
  static SK_INLINE U join_low(Wide a, Wide b) {
    return U((Integers)_mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA));
  }
  static SK_INLINE U join_high(Wide a, Wide b) {
    return U((Integers)_mm256_blend_epi32(high(a), b, 0xAA));
  }

  static SK_INLINE F zip_low(F a, F b) { return F(_mm256_unpacklo_ps(a.v, b.v)); }
  static SK_INLINE F zip_high(F a, F b) { return F(_mm256_unpackhi_ps(a.v, b.v)); }
  static SK_INLINE F low_halves(F a, F b) { return F(_mm256_shuffle_ps(a.v, b.v, 0x44)); }
  static SK_INLINE F high_halves(F a, F b) { return F(_mm256_shuffle_ps(a.v, b.v, 0xEE)); }
  static SK_INLINE F deal_pairs(F a) {
    return F((Floats)_mm256_permute4x64_epi64((__m256i)a.v, 0xD8));
  }
};

SK_INLINE AnyVector::F fma(AnyVector::F a, AnyVector::F b, AnyVector::F c) {
  return AnyVector::F(_mm256_fmadd_ps(a.v, b.v, c.v));
}
SK_INLINE AnyVector::F square_root(AnyVector::F a) { return AnyVector::F(_mm256_sqrt_ps(a.v)); }
SK_INLINE AnyVector::F from_signed(AnyVector::U a) {
  return AnyVector::F(_mm256_cvtepi32_ps((__m256i)a.v));
}
// AVX2 converts signed only: both halves are exact, the fma rounds their sum once.
SK_INLINE AnyVector::F from_unsigned(AnyVector::U a) {
  const AnyVector::U low = a & AnyVector::U(0xFFFF), high(a.v >> 16);
  return fma(from_signed(high), AnyVector::F(65536.0f), from_signed(low));
}

#elif defined(SK_NEON)

struct IsaVector : AnyVector {
  static constexpr int kRegisters = 32;

  using Wide = uint64x2_t;
  static SK_INLINE Wide wide(uint32_t x) { return vdupq_n_u64(x); }
  static SK_INLINE Wide multiply(Wide a, Wide b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
  static SK_INLINE Wide high(Wide a) { return vshrq_n_u64(a, 32); }
  static SK_INLINE Wide exclusive(Wide a, Wide b, Wide c) { return veorq_u64(a, veorq_u64(b, c)); }
  static SK_INLINE Wide even(U a) { return (Wide)a.v; }
  static SK_INLINE Wide odd(U a) { return high(even(a)); }
  static SK_INLINE U join_low(Wide a, Wide b) {
    return U(vtrn1q_u32((uint32x4_t)a, (uint32x4_t)b));
  }
  static SK_INLINE U join_high(Wide a, Wide b) {
    return U(vtrn2q_u32((uint32x4_t)a, (uint32x4_t)b));
  }

  static SK_INLINE F zip_low(F a, F b) { return F(vzip1q_f32(a.v, b.v)); }
  static SK_INLINE F zip_high(F a, F b) { return F(vzip2q_f32(a.v, b.v)); }
  static SK_INLINE F low_halves(F a, F b) {
    return F(vcombine_f32(vget_low_f32(a.v), vget_low_f32(b.v)));
  }
  static SK_INLINE F high_halves(F a, F b) {
    return F(vcombine_f32(vget_high_f32(a.v), vget_high_f32(b.v)));
  }
  static SK_INLINE F deal_pairs(F a) { return a; }
};

SK_INLINE AnyVector::F fma(AnyVector::F a, AnyVector::F b, AnyVector::F c) {
  return AnyVector::F(vfmaq_f32(c.v, a.v, b.v));
}
SK_INLINE AnyVector::F square_root(AnyVector::F a) { return AnyVector::F(vsqrtq_f32(a.v)); }
SK_INLINE AnyVector::F from_signed(AnyVector::U a) {
  return AnyVector::F(vcvtq_f32_s32((int32x4_t)a.v));
}
SK_INLINE AnyVector::F from_unsigned(AnyVector::U a) { return AnyVector::F(vcvtq_f32_u32(a.v)); }

#endif

#ifdef SK_VECTOR

struct Vector : IsaVector {
  static SK_INLINE void interleave(F& a, F& b) {
    const F low = zip_low(a, b);
    b = zip_high(a, b);
    a = low;
  }
  // The 4 x 4 transpose within every 128 bits.
  static SK_INLINE void transpose(F& a, F& b, F& c, F& d) {
    interleave(a, b);
    interleave(c, d);
    const F ab_low = a, ab_high = b, cd_low = c, cd_high = d;
    a = low_halves(ab_low, cd_low);
    b = high_halves(ab_low, cd_low);
    c = low_halves(ab_high, cd_high);
    d = high_halves(ab_high, cd_high);
  }
};

#endif

}  // namespace sk

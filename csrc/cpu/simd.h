// One vector type pair per instruction set: F (fp32 lanes) and U (uint32 lanes), with the
// primitives that csrc/noise.h is written in, and the few shuffles that fill.h needs.
//
// Philox multiplies 32 x 32 -> 64 bits, which vectors do for every second lane. A Philox word of
// kLanes counters is therefore held as two registers of 64-bit lanes whose low halves count and
// whose high halves hold rubbish: `even` for the even 32-bit lanes, `odd` for the odd ones.
#pragma once

#include "../noise.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#define SK_VECTOR
#elif defined(SK_NEON)
#include <arm_neon.h>
#define SK_VECTOR
#endif

#define SK_LAMBDA_INLINE __attribute__((always_inline))

#define SK_OPERATOR(T, op, call) \
  friend SK_INLINE T operator op(T a, T b) { return T(call(a.v, b.v)); }

namespace sk {

#if defined(__AVX512F__)

struct Vector {
  static constexpr int kLanes = 16, kRegisters = 32;

  struct U {
    __m512i v;
    SK_INLINE explicit U(__m512i x) : v(x) {}
    SK_INLINE explicit U(uint32_t x) : v(_mm512_set1_epi32(int(x))) {}
    SK_OPERATOR(U, +, _mm512_add_epi32)
    SK_OPERATOR(U, -, _mm512_sub_epi32)
    SK_OPERATOR(U, &, _mm512_and_si512)
    SK_OPERATOR(U, |, _mm512_or_si512)
    SK_OPERATOR(U, ^, _mm512_xor_si512)
  };

  struct F {
    __m512 v;
    SK_INLINE explicit F(__m512 x) : v(x) {}
    SK_INLINE explicit F(float x) : v(_mm512_set1_ps(x)) {}
    SK_OPERATOR(F, *, _mm512_mul_ps)
    SK_OPERATOR(F, -, _mm512_sub_ps)
    friend SK_INLINE F fma(F a, F b, F c) { return F(_mm512_fmadd_ps(a.v, b.v, c.v)); }
    friend SK_INLINE F square_root(F a) { return F(_mm512_sqrt_ps(a.v)); }
    friend SK_INLINE U to_bits(F a) { return U(_mm512_castps_si512(a.v)); }
  };
  friend SK_INLINE F from_bits(U a) { return F(_mm512_castsi512_ps(a.v)); }
  friend SK_INLINE F from_signed(U a) { return F(_mm512_cvtepi32_ps(a.v)); }
  friend SK_INLINE F from_unsigned(U a) { return F(_mm512_cvtepu32_ps(a.v)); }

  // 64-bit lanes: low * low, the high half moved down, a ^ b ^ c.
  using Wide = __m512i;
  static SK_INLINE Wide wide(uint32_t x) { return _mm512_set1_epi64(x); }
  static SK_INLINE Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
  static SK_INLINE Wide high(Wide a) { return _mm512_srli_epi64(a, 32); }
  static SK_INLINE Wide exclusive(Wide a, Wide b, Wide c) {
    return _mm512_ternarylogic_epi32(a, b, c, 0x96);
  }
  static SK_INLINE Wide even(U a) { return a.v; }
  static SK_INLINE Wide odd(U a) { return high(a.v); }
  // The 32-bit lanes back from the low (or the high) halves of an even and an odd register.
  static SK_INLINE U join_low(Wide a, Wide b) {
    return U(_mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CCAA));
  }
  static SK_INLINE U join_high(Wide a, Wide b) {
    return U(_mm512_mask_shuffle_epi32(b, 0x5555, a, _MM_PERM_DDBB));
  }

  static SK_INLINE U load(const uint32_t* p) { return U(_mm512_loadu_si512(p)); }
  static SK_INLINE F load(const float* p) { return F(_mm512_loadu_ps(p)); }
  static SK_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }

  // Within every 128 bits: a0 b0 a1 b1 and a2 b2 a3 b3; the 4 x 4 transpose of a, b, c, d.
  static SK_INLINE void interleave(F& a, F& b) {
    const F low = F(_mm512_unpacklo_ps(a.v, b.v));
    b = F(_mm512_unpackhi_ps(a.v, b.v));
    a = low;
  }
  static SK_INLINE void transpose(F& a, F& b, F& c, F& d) {
    const __m512 ab_low = _mm512_unpacklo_ps(a.v, b.v), ab_high = _mm512_unpackhi_ps(a.v, b.v);
    const __m512 cd_low = _mm512_unpacklo_ps(c.v, d.v), cd_high = _mm512_unpackhi_ps(c.v, d.v);
    a = F(_mm512_shuffle_ps(ab_low, cd_low, 0x44));
    b = F(_mm512_shuffle_ps(ab_low, cd_low, 0xEE));
    c = F(_mm512_shuffle_ps(ab_high, cd_high, 0x44));
    d = F(_mm512_shuffle_ps(ab_high, cd_high, 0xEE));
  }
};

#elif defined(__AVX2__)

struct Vector {
  static constexpr int kLanes = 8, kRegisters = 16;

  struct U {
    __m256i v;
    SK_INLINE explicit U(__m256i x) : v(x) {}
    SK_INLINE explicit U(uint32_t x) : v(_mm256_set1_epi32(int(x))) {}
    SK_OPERATOR(U, +, _mm256_add_epi32)
    SK_OPERATOR(U, -, _mm256_sub_epi32)
    SK_OPERATOR(U, &, _mm256_and_si256)
    SK_OPERATOR(U, |, _mm256_or_si256)
    SK_OPERATOR(U, ^, _mm256_xor_si256)
  };

  struct F {
    __m256 v;
    SK_INLINE explicit F(__m256 x) : v(x) {}
    SK_INLINE explicit F(float x) : v(_mm256_set1_ps(x)) {}
    SK_OPERATOR(F, *, _mm256_mul_ps)
    SK_OPERATOR(F, -, _mm256_sub_ps)
    friend SK_INLINE F fma(F a, F b, F c) { return F(_mm256_fmadd_ps(a.v, b.v, c.v)); }
    friend SK_INLINE F square_root(F a) { return F(_mm256_sqrt_ps(a.v)); }
    friend SK_INLINE U to_bits(F a) { return U(_mm256_castps_si256(a.v)); }
  };
  friend SK_INLINE F from_bits(U a) { return F(_mm256_castsi256_ps(a.v)); }
  friend SK_INLINE F from_signed(U a) { return F(_mm256_cvtepi32_ps(a.v)); }
  // AVX2 converts signed only: both halves are exact, the fma rounds their sum once.
  friend SK_INLINE F from_unsigned(U a) {
    const F low = F(_mm256_cvtepi32_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(0xFFFF))));
    return fma(F(_mm256_cvtepi32_ps(_mm256_srli_epi32(a.v, 16))), F(65536.0f), low);
  }

  using Wide = __m256i;
  static SK_INLINE Wide wide(uint32_t x) { return _mm256_set1_epi64x(x); }
  static SK_INLINE Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
  static SK_INLINE Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
  static SK_INLINE Wide exclusive(Wide a, Wide b, Wide c) {
    return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
  }
  static SK_INLINE Wide even(U a) { return a.v; }
  static SK_INLINE Wide odd(U a) { return high(a.v); }
  static SK_INLINE U join_low(Wide a, Wide b) {
    return U(_mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA));
  }
  static SK_INLINE U join_high(Wide a, Wide b) { return U(_mm256_blend_epi32(high(a), b, 0xAA)); }

  static SK_INLINE U load(const uint32_t* p) {
    return U(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SK_INLINE F load(const float* p) { return F(_mm256_loadu_ps(p)); }
  static SK_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }

  static SK_INLINE void interleave(F& a, F& b) {
    const F low = F(_mm256_unpacklo_ps(a.v, b.v));
    b = F(_mm256_unpackhi_ps(a.v, b.v));
    a = low;
  }
  static SK_INLINE void transpose(F& a, F& b, F& c, F& d) {
    const __m256 ab_low = _mm256_unpacklo_ps(a.v, b.v), ab_high = _mm256_unpackhi_ps(a.v, b.v);
    const __m256 cd_low = _mm256_unpacklo_ps(c.v, d.v), cd_high = _mm256_unpackhi_ps(c.v, d.v);
    a = F(_mm256_shuffle_ps(ab_low, cd_low, 0x44));
    b = F(_mm256_shuffle_ps(ab_low, cd_low, 0xEE));
    c = F(_mm256_shuffle_ps(ab_high, cd_high, 0x44));
    d = F(_mm256_shuffle_ps(ab_high, cd_high, 0xEE));
  }
};

#elif defined(SK_NEON)

struct Vector {
  static constexpr int kLanes = 4, kRegisters = 32;

  struct U {
    uint32x4_t v;
    SK_INLINE explicit U(uint32x4_t x) : v(x) {}
    SK_INLINE explicit U(uint32_t x) : v(vdupq_n_u32(x)) {}
    SK_OPERATOR(U, +, vaddq_u32)
    SK_OPERATOR(U, -, vsubq_u32)
    SK_OPERATOR(U, &, vandq_u32)
    SK_OPERATOR(U, |, vorrq_u32)
    SK_OPERATOR(U, ^, veorq_u32)
  };

  struct F {
    float32x4_t v;
    SK_INLINE explicit F(float32x4_t x) : v(x) {}
    SK_INLINE explicit F(float x) : v(vdupq_n_f32(x)) {}
    SK_OPERATOR(F, *, vmulq_f32)
    SK_OPERATOR(F, -, vsubq_f32)
    friend SK_INLINE F fma(F a, F b, F c) { return F(vfmaq_f32(c.v, a.v, b.v)); }
    friend SK_INLINE F square_root(F a) { return F(vsqrtq_f32(a.v)); }
    friend SK_INLINE U to_bits(F a) { return U(vreinterpretq_u32_f32(a.v)); }
  };
  friend SK_INLINE F from_bits(U a) { return F(vreinterpretq_f32_u32(a.v)); }
  friend SK_INLINE F from_signed(U a) { return F(vcvtq_f32_s32(vreinterpretq_s32_u32(a.v))); }
  friend SK_INLINE F from_unsigned(U a) { return F(vcvtq_f32_u32(a.v)); }

  using Wide = uint64x2_t;
  static SK_INLINE Wide wide(uint32_t x) { return vdupq_n_u64(x); }
  static SK_INLINE Wide multiply(Wide a, Wide b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
  static SK_INLINE Wide high(Wide a) { return vshrq_n_u64(a, 32); }
  static SK_INLINE Wide exclusive(Wide a, Wide b, Wide c) { return veorq_u64(a, veorq_u64(b, c)); }
  static SK_INLINE Wide even(U a) { return vreinterpretq_u64_u32(a.v); }
  static SK_INLINE Wide odd(U a) { return high(even(a)); }
  static SK_INLINE U join_low(Wide a, Wide b) {
    return U(vtrn1q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)));
  }
  static SK_INLINE U join_high(Wide a, Wide b) {
    return U(vtrn2q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)));
  }

  static SK_INLINE U load(const uint32_t* p) { return U(vld1q_u32(p)); }
  static SK_INLINE F load(const float* p) { return F(vld1q_f32(p)); }
  static SK_INLINE void store(float* p, F a) { vst1q_f32(p, a.v); }

  static SK_INLINE void interleave(F& a, F& b) {
    const F low = F(vzip1q_f32(a.v, b.v));
    b = F(vzip2q_f32(a.v, b.v));
    a = low;
  }
  static SK_INLINE void transpose(F& a, F& b, F& c, F& d) {
    const float32x4_t ab_low = vzip1q_f32(a.v, b.v), ab_high = vzip2q_f32(a.v, b.v);
    const float32x4_t cd_low = vzip1q_f32(c.v, d.v), cd_high = vzip2q_f32(c.v, d.v);
    a = F(vcombine_f32(vget_low_f32(ab_low), vget_low_f32(cd_low)));
    b = F(vcombine_f32(vget_high_f32(ab_low), vget_high_f32(cd_low)));
    c = F(vcombine_f32(vget_low_f32(ab_high), vget_low_f32(cd_high)));
    d = F(vcombine_f32(vget_high_f32(ab_high), vget_high_f32(cd_high)));
  }
};

#endif

}  // namespace sk

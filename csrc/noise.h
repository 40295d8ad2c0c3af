// The noise contract: every random number is a pure function of
// (seed, purpose, sample, draw, element). Host and device, scalar and vector, one text.
//
//   word[0..3] = Philox4x32-10(key     = (seed_lo, seed_hi),
//                              counter = (block, draw, sample_lo, purpose << 24 | sample_hi24))
//
//   seed     64 bits
//   sample   56 bits, the global index of a sample: first_sample + row of the batch, or the row's
//            address
//   draw     32 bits, the step of a chain or of training
//   block    element / 4 inside the flattened sample; element % 4 takes word (or normal) % 4
//   purpose  8 bits, one named constant per use, so that one seed never feeds two uses
//
// A row with an address (sample, piece, draw) is the piece-th run of D elements of that sample: its
// blocks start at piece * ceil(D / 4). The address's draw is added to the batch's.
//
// Normals come in pairs, (w0, w1) -> (z0, z1) and (w2, w3) -> (z2, z3), by Box and Muller (1958):
//
//   u  = fma(float(w0), 2^-32, 2^-33)                in (0, 1], rounded to fp32 once
//   r  = sqrt(-2 ln u) * (-1)^(top bit of w1)
//   g  = float(int32(w1 << 1)) * 2^-31               in [-1, 1], the low 31 bits of w1
//   z0 = r cos(pi/2 g)    z1 = r sin(pi/2 g)
//
// g covers the half circle with cos >= 0 and the sign of r the other half, so that the angle is
// uniform with no octant swap. ln, cos and sin are the polynomials below, evaluated by Horner's
// rule with one IEEE fma a term; every other operation is one correctly rounded IEEE operation,
// the square root included. No libm, no contraction (-ffp-contract=off, --fmad=false): the
// normals are the same bits wherever IEEE fp32 arithmetic exists. The coefficients
// (tools/fit_normals.py) are such that a machine without fma gets these bits too: evaluating each
// fma in fp64 and rounding the result to fp32 agrees for every one of the 2^32 words, which
// tests/host/exhaustive.cpp shows. Within 2e-6 of the exact function of u and the angle.
//
// Philox: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// A header of its own, C++17 and CUDA, installed as <score_kernels/noise.h>: names are in sk::,
// macros begin with SK_. SK_NOISE_VERSION grows when a bit of a stream or a name of this file
// changes.
#pragma once

#ifdef __FAST_MATH__
#error "noise.h: compiled with -ffast-math, which changes the noise; use -ffp-contract=off alone"
#endif
#define SK_NOISE_VERSION 1

#ifdef __CUDACC_RTC__
// NVRTC has the functions without the headers, and no names for the integers.
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef unsigned short uint16_t;
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

#ifdef __CUDACC__
#define SK_INLINE __host__ __device__ __forceinline__
#else
#define SK_INLINE inline __attribute__((always_inline))
#endif

namespace sk {

// Of a row; in Python an int64 pair (sample, draw << 32 | piece).
struct Address {
  uint64_t sample;
  uint32_t piece, draw;
};

// Which draw of which stream, and which samples the rows of a batch are.
struct NoiseKey {
  uint64_t seed;
  uint64_t first_sample;
  uint32_t draw;
  uint32_t purpose;
  // Of all rows, and then the largest of each of their fields; null: row r is sample
  // first_sample + r.
  const Address* addresses;
};

// The counter of a row's first block. in_range, 0 or 1: the contract's counter has all its blocks.
struct Counter {
  uint32_t block, draw, sample_low, sample_high, in_range;
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Words {
  uint32_t w[4];
};

struct Product {
  uint32_t low, high;
};

// In words nvcc makes of the 64-bit product one instruction and one that adds a zero.
SK_INLINE Product multiply(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  Product p;
  asm("{.reg .u64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p;}"
      : "=r"(p.low), "=r"(p.high)
      : "r"(a), "r"(b));
  return p;
#else
  const uint64_t p = uint64_t{a} * b;
  return {uint32_t(p), uint32_t(p >> 32)};
#endif
}

SK_INLINE Words philox4x32_10(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const Product p0 = multiply(c.w[0], kPhiloxM0), p1 = multiply(c.w[2], kPhiloxM1);
    c = {{p1.high ^ c.w[1] ^ k0, p1.low, p0.high ^ c.w[3] ^ k1, p0.low}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// Of a row of so many elements.
SK_INLINE Counter counter_of(const NoiseKey& key, uint64_t row, uint64_t elements) {
  uint64_t sample = key.first_sample + row, block = 0, draw = key.draw;
  bool in_range = true;
  if (key.addresses) {
    const Address address = key.addresses[row];
    const uint64_t blocks = (elements + 3) / 4;
    sample = address.sample;
    block = address.piece * blocks;
    draw += address.draw;
    in_range = sample >> 56 == 0 && draw >> 32 == 0 && (block + blocks - 1) >> 32 == 0;
  }
  return {in_range ? uint32_t(block) : 0, uint32_t(draw), uint32_t(sample),
          key.purpose << 24 | (uint32_t(sample >> 32) & 0xFFFFFFu), in_range};
}

// The words of a row's block, counted from the sample's first.
SK_INLINE Words words_of(const NoiseKey& key, const Counter& row, uint32_t block) {
  return philox4x32_10({{block, row.draw, row.sample_low, row.sample_high}}, uint32_t(key.seed),
                       uint32_t(key.seed >> 32));
}

// The primitives that the maths below is written in. A vector type brings its own overloads.
SK_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
// Of a normal x above zero. On a GPU: what nvcc makes of sqrt.rn less the branch for radicands that
// never come up here, a seed and one Markstein step.
SK_INLINE float square_root(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float g = x * y, h = 0.5f * y;
  return fma(fma(-g, g, x), h, g);
#else
  return ::sqrtf(x);
#endif
}
SK_INLINE float from_unsigned(uint32_t w) { return float(w); }
SK_INLINE float from_signed(uint32_t w) { return float(int32_t(w)); }
SK_INLINE float from_bits(uint32_t w) {
  float x;
  memcpy(&x, &w, sizeof x);
  return x;
}
SK_INLINE uint32_t to_bits(float x) {
  uint32_t w;
  memcpy(&w, &x, sizeof w);
  return w;
}

// Lowest order first; F is float or a vector of floats.
template <class F>
SK_INLINE F horner(F x, const F c) {
  (void)x;
  return c;
}
template <class F, class... Rest>
SK_INLINE F horner(F x, const F c, Rest... rest) {
  return fma(x, horner(x, rest...), c);
}

// Uniform in (0, 1].
template <class F, class U>
SK_INLINE F uniform(U w) {
  return fma(from_unsigned(w), F(0x1p-32f), F(0x1p-33f));
}

// -1 or +1: the top bit of the word is the sign.
template <class F, class U>
SK_INLINE F rademacher(U w) {
  return from_bits((w & U(0x80000000u)) | U(0x3F800000u));
}

// sqrt(-2 ln u): u = m 2^k with m in [sqrt 1/2, sqrt 2), -2 ln u = f P(f) - 2 ln 2 k, f = m - 1.
// 2^-44 keeps the radicand of u = 1 above zero, so that a root made from a reciprocal root works.
template <class F, class U>
SK_INLINE F radius(U w) {
  const U bits = to_bits(uniform<F>(w));
  const U exponent = (bits - U(0x3F3504F3u)) & U(0xFF800000u);
  const F f = from_bits(bits - exponent) - F(1.0f);
  const F scaled = fma(from_signed(exponent), F(-0x1.62e43p-23f), F(0x1p-44f));
  const F p = horner(f, F(-0x1p+1f), F(0x1.0002e2p+0f), F(-0x1.5528f8p-1f), F(0x1.fd80f6p-2f),
                     F(-0x1.a3114ep-2f), F(0x1.82eb24p-2f), F(-0x1.f4fap-3f));
  return square_root(fma(f, p, scaled));
}

// cos and sin of pi/2 g, g the low 31 bits of w as a signed fraction of one.
template <class F, class U>
SK_INLINE void half_circle(U w, F& cosine, F& sine) {
  const F g = from_signed(w + w) * F(0x1p-31f);
  const F q = g * g;
  cosine = horner(q, F(0x1p+0f), F(-0x1.3bd3bp+0f), F(0x1.03bd9ap-2f), F(-0x1.55020cp-6f),
                  F(0x1.c2939ap-11f));
  sine = g * horner(q, F(0x1.921fb4p+0f), F(-0x1.4abba2p-1f), F(0x1.466504p-4f), F(-0x1.31fbf4p-8f),
                    F(0x1.3912a8p-13f));
}

template <class F, class U>
SK_INLINE void box_muller(U w0, U w1, F& z0, F& z1) {
  const F r = from_bits(to_bits(radius<F>(w0)) ^ (w1 & U(0x80000000u)));
  half_circle(w1, z0, z1);
  z0 = r * z0;
  z1 = r * z1;
}

// The four words of a block -> its four values. F is float or a vector of floats, U its bits.
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

// The values of a block: map_words<NormalMap>(words_of(key, row, block), z), z four floats.
template <class Map>
SK_INLINE void map_words(const Words& words, float* v) {
  Map::apply(words.w[0], words.w[1], words.w[2], words.w[3], v);
}

}  // namespace sk

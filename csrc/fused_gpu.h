// Chains of fused scores on a GPU: a thread takes a row through all steps. Compiled at run time by
// NVRTC, with functions for the device by default; csrc/fused.h includes it.
#pragma once

#include "update.h"

#define SK_FUSED inline __device__
#define SK_UNROLL(count) SK_PRAGMA(unroll count)

namespace sk {
namespace fused {

// All steps of the rows x [rows, kElements], with (a, b, c, sigma, scale) from a line of the table
// for each step, which ends as `end` says.
template <class F, int kElements, class Score>
__device__ void run_chain(float* x, const float* table, NoiseKey key, uint32_t rows, uint32_t steps,
                          End end, float low, float high, const Score& score) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  Counter counter = counter_of(key, row, kElements);
  key.draw += steps - 1;
  // As of the other kernels: NaN where the noise contract has no such number.
  const bool in_range = counter_of(key, row, kElements).in_range;
  x += uint64_t{row} * kElements;
  F state[kElements], scaled[kElements], s[kElements];
  for (int e = 0; e < kElements; ++e) state[e] = x[e];
  for (uint32_t t = 0; t < steps; ++t, ++counter.draw) {
    const float* line = table + 5 * t;
    const float a = line[0], b = line[1], c = line[2];
    for (int e = 0; e < kElements; ++e) scaled[e] = state[e].v * line[4];
    score(scaled, F(line[3]), s);
    if (c == 0.0f)
      for (int e = 0; e < kElements; ++e) state[e] = affine(a, state[e].v, b, s[e].v);
    for (int first = 0; c != 0.0f && first < kElements; first += 4) {
      float z[4];
      map_words<NormalMap>(words_of(key, counter, counter.block + uint32_t(first / 4)), z);
      for (int i = 0; i < 4 && first + i < kElements; ++i)
        state[first + i] = affine(a, state[first + i].v, b, s[first + i].v, c,
                                  in_range ? z[i] : from_bits(0x7FC00000u));
    }
    if (end != End::kNone)
      for (int e = 0; e < kElements; ++e) state[e] = ended(end, state[e].v, low, high);
  }
  for (int e = 0; e < kElements; ++e) x[e] = state[e].v;
}

}  // namespace fused
}  // namespace sk

// Integers as 32 bits each: what a launch by torch.cuda._compile_kernel can hand over.
#define SK_FUSED_SCORE(elements)                                                                   \
  extern "C" __global__ void sk_chain(                                                             \
      float* x, const float* table, const float* params, const long long* addresses, int rows,     \
      int steps, int seed_low, int seed_high, int sample_low, int sample_high, int draw,           \
      int purpose, int addressed, int end, int low, int high) {                                    \
    using sk::fused::F;                                                                            \
    const sk::NoiseKey key = {                                                                     \
        uint64_t{uint32_t(seed_high)} << 32 | uint32_t(seed_low),                                  \
        uint64_t{uint32_t(sample_high)} << 32 | uint32_t(sample_low), uint32_t(draw),              \
        uint32_t(purpose), addressed ? reinterpret_cast<const sk::Address*>(addresses) : nullptr}; \
    sk::fused::run_chain<F, elements>(                                                             \
        x, table, key, rows, steps, sk::End(end), sk::from_bits(low), sk::from_bits(high),         \
        [params](const F* x, F sigma, F* s) { score(x, sigma, s, params); });                      \
  }

// Chains of fused scores on a GPU: a thread takes a row through all steps. Compiled at run time by
// NVRTC, with functions for the device by default; csrc/fused.h includes it.
#pragma once

#include "update.h"

#define SK_FUSED inline __device__
#define SK_UNROLL(count) SK_PRAGMA(unroll count)

namespace sk {
namespace fused {

// As csrc/args.h's ChainArgs: lines (a, b, c, sigma, scale) of a table for each step.
struct GpuChain {
  float* x;
  const float *table, *params;
  const Address* addresses;
  uint32_t rows, steps, seed_low, seed_high, sample_low, sample_high, draw, purpose;
};

template <class F, int kElements, class Score>
__device__ void run_chain(const GpuChain& chain, const Score& score) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= chain.rows) return;
  NoiseKey key = {};
  key.seed = uint64_t{chain.seed_high} << 32 | chain.seed_low;
  key.first_sample = uint64_t{chain.sample_high} << 32 | chain.sample_low;
  key.draw = chain.draw, key.purpose = chain.purpose, key.addresses = chain.addresses;
  Counter counter = counter_of(key, row, kElements);
  key.draw += chain.steps - 1;
  // As of the other kernels: NaN where the noise contract has no such number.
  const bool in_range = counter_of(key, row, kElements).in_range;
  float* const to = chain.x + uint64_t{row} * kElements;
  F x[kElements], scaled[kElements], s[kElements];
  for (int e = 0; e < kElements; ++e) x[e] = to[e];
  for (uint32_t t = 0; t < chain.steps; ++t, ++counter.draw) {
    const float* line = chain.table + 5 * t;
    const float a = line[0], b = line[1], c = line[2];
    for (int e = 0; e < kElements; ++e) scaled[e] = x[e].v * line[4];
    score(scaled, F(line[3]), s, chain.params);
    if (c == 0.0f) {
      for (int e = 0; e < kElements; ++e) x[e] = affine(a, x[e].v, b, s[e].v);
      continue;
    }
    for (int first = 0; first < kElements; first += 4) {
      float z[4];
      map_words<NormalMap>(words_of(key, counter, counter.block + uint32_t(first / 4)), z);
      for (int i = 0; i < 4 && first + i < kElements; ++i)
        x[first + i] = affine(a, x[first + i].v, b, s[first + i].v, c,
                              in_range ? z[i] : from_bits(0x7FC00000u));
    }
  }
  for (int e = 0; e < kElements; ++e) to[e] = x[e].v;
}

}  // namespace fused
}  // namespace sk

// Integers as 32 bits each: what a launch by torch.cuda._compile_kernel can hand over.
#define SK_FUSED_SCORE(elements)                                                               \
  extern "C" __global__ void sk_chain(float* x, const float* table, const float* params,       \
                                      const long long* addresses, int rows, int steps,         \
                                      int seed_low, int seed_high, int sample_low,             \
                                      int sample_high, int draw, int purpose, int addressed) { \
    using sk::fused::F;                                                                        \
    const sk::fused::GpuChain chain = {                                                        \
        x,                                                                                     \
        table,                                                                                 \
        params,                                                                                \
        addressed ? reinterpret_cast<const sk::Address*>(addresses) : nullptr,                 \
        uint32_t(rows),                                                                        \
        uint32_t(steps),                                                                       \
        uint32_t(seed_low),                                                                    \
        uint32_t(seed_high),                                                                   \
        uint32_t(sample_low),                                                                  \
        uint32_t(sample_high),                                                                 \
        uint32_t(draw),                                                                        \
        uint32_t(purpose)};                                                                    \
    sk::fused::run_chain<F, elements>(                                                         \
        chain, [](const F* x, F sigma, F* s, const float* p) { score(x, sigma, s, p); });      \
  }

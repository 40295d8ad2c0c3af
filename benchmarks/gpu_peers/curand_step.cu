// The Langevin step x + a/2 score + sqrt(a) z with cuRAND's normals: a Philox state for each
// thread, made once, four elements a turn, loads and stores of 128 bits. The offset is in blocks of
// four words, so that curand_normal4 is known never to straddle two.
#include <curand_kernel.h>

extern "C" __global__ void curand_step(float4* out, const float4* __restrict__ x,
                                       const float4* __restrict__ score, unsigned quads,
                                       float drift, float spread, unsigned long long seed,
                                       unsigned long long blocks) {
  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
  curandStatePhilox4_32_10_t state;
  curand_init(seed, thread, 4 * blocks, &state);
  for (unsigned i = thread; i < quads; i += gridDim.x * blockDim.x) {
    const float4 at = x[i], s = score[i], z = curand_normal4(&state);
    out[i] = make_float4(at.x + drift * s.x + spread * z.x, at.y + drift * s.y + spread * z.y,
                         at.z + drift * s.z + spread * z.z, at.w + drift * s.w + spread * z.w);
  }
}

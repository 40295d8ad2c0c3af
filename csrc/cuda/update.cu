// The affine step x <- a x + b score + c z.
#include "../update.h"

#include "launch.h"

namespace sk {
namespace {

struct Coefficients {
  float a, b, c;
};

__device__ __forceinline__ Quad combine(const Quad& x, const Quad& score, Coefficients k) {
  const Pair a(k.a), b(k.b);
  const Pair low = affine(a, {x.v[0], x.v[1]}, b, {score.v[0], score.v[1]});
  const Pair high = affine(a, {x.v[2], x.v[3]}, b, {score.v[2], score.v[3]});
  return {{low.a, low.b, high.a, high.b}};
}

template <class Score, bool kVector, bool kNoise>
__device__ __forceinline__ void step_rows(const AffineArgs& args, Coefficients k, uint32_t draw) {
  const uint64_t elements = args.elements;
  NoiseKey key = args.key;
  key.draw = draw;
  each_row(args.rows, [&](uint64_t row) {
    // out may be x: all reads of a turn come before its writes.
    const float* x = args.x + row * elements;
    const Score* score = static_cast<const Score*>(args.score) + row * elements;
    float* out = args.out + row * elements;
    each_turn(walk_of_grid(elements), [&](auto count, uint32_t quad) {
      Quad xs[count.value];
      Four<Score> scores[count.value];
      for (int i = 0; i < count.value; ++i) {
        xs[i] = load<kVector>(x, quad, i * kWarp, elements);
        scores[i] = load<kVector>(score, quad, i * kWarp, elements);
      }
      for (int i = 0; i < count.value; ++i) {
        Quad next = combine(xs[i], to_float(scores[i]), k);
        if (kNoise) {
          const Quad z = NormalQuads::of(words_of(key, row, quad + i * kWarp));
          for (uint32_t e = 0; e < kQuad; ++e) next.v[e] = fma(k.c, z.v[e], next.v[e]);
        }
        store<kVector>(out, quad, i * kWarp, elements, next);
      }
    });
  });
}

template <class Score, bool kVector>
__global__ void __launch_bounds__(kThreads) affine_kernel(AffineArgs args, StepTable steps) {
  Coefficients k = {args.a, args.b, args.c};
  uint32_t draw = args.key.draw;
  if (steps.table) {
    const int64_t step = *steps.step;
    const float* row = steps.table + 3 * step;
    const bool inside = uint64_t(step) < steps.steps;
    k = inside ? Coefficients{row[0], row[1], row[2]} : Coefficients{NAN, NAN, NAN};
    draw += uint32_t(step);
  }
  if (k.c == 0.0f)
    step_rows<Score, kVector, false>(args, k, draw);
  else
    step_rows<Score, kVector, true>(args, k, draw);
}

}  // namespace

void cuda::affine_step(const AffineArgs& args, const StepTable& steps, const Place& place) {
  if (args.rows == 0 || args.elements == 0) return;
  const DeviceGuard guard(place.device);
  with_dtype(args.score_dtype, [&](auto* null) {
    using Score = std::remove_pointer_t<decltype(null)>;
    const bool vector = args.elements % kQuad == 0 && whole_quads(args.x) &&
                        whole_quads(args.out) &&
                        whole_quads(static_cast<const Score*>(args.score));
    launch("affine_step", vector ? affine_kernel<Score, true> : affine_kernel<Score, false>,
           grid_of_turns(args.rows, args.elements, place), args, steps);
  });
}

}  // namespace sk

// The affine step x <- a x + b score + c z.
#include "../update.h"
#include "launch.h"

namespace sk {
namespace {

__device__ __forceinline__ Quad combine(float a, const Quad& x, const Quad& b, const Quad& score) {
  const Pair factor(a);
  const Pair low = affine(factor, {x.v[0], x.v[1]}, {b.v[0], b.v[1]}, {score.v[0], score.v[1]});
  const Pair high = affine(factor, {x.v[2], x.v[3]}, {b.v[2], b.v[3]}, {score.v[2], score.v[3]});
  return {{low.a, low.b, high.a, high.b}};
}

// What a step has besides its coefficients: nothing; known elements; all that TableArgs may have,
// looked for in every quad.
constexpr int kNothing = 0, kKnown = 1, kAll = 2;

template <class Score, bool kVector, bool kNoise, int kMore, class Args>
__device__ __forceinline__ void step_row(const Args& args, const NoiseKey& key, uint64_t row,
                                         Coefficients k) {
  struct Inputs {
    Quad x;
    Four<Score> score;
  };
  const Place place(key, row, args.elements);
  const Row<kVector, const float> x(args.x, place);
  const Row<kVector, const Score> scores(static_cast<const Score*>(args.score), place);
  const Row<kVector, float> out(args.out, place);
  k.c = place.checked(k.c);
  k.noise_scale = place.checked(k.noise_scale);
  each_quad(
      place, range_of_grid(args.elements),
      [&](At at) { return Inputs{x.load(at), scores.load(at)}; },
      [&](At at, const Inputs& in) {
        Quad b = {{k.b, k.b, k.b, k.b}}, c = {{k.c, k.c, k.c, k.c}};
        if constexpr (kMore == kAll)
          if (args.precondition) {
            const Quad g = Row<kVector, const float>(args.precondition, place).load(at);
            for (uint32_t e = 0; e < kQuad; ++e) {
              b.v[e] *= g.v[e];
              c.v[e] *= gain_root(g.v[e]);
            }
          }
        Quad next = combine(k.a, in.x, b, to_floats(in.score));
        // There may be noise for one of the known and the other elements alone.
        bool none[kQuad] = {};
        if constexpr (kMore != kNothing)
          if (kMore == kKnown || args.known) {
            const Quad known = Row<kVector, const float>(args.known, place).load(at);
            const auto mask = Row<kVector, const uint8_t>(args.mask, place).load(at);
            for (uint32_t e = 0; e < kQuad; ++e) {
              next.v[e] = mask.v[e] ? k.scale * known.v[e] : next.v[e];
              c.v[e] = mask.v[e] ? k.noise_scale : c.v[e];
              none[e] = (mask.v[e] ? k.noise_scale : k.c) == 0.0f;
            }
          }
        if (kNoise) {
          const Quad z = values_of<NormalMap>(words_of(key, place.counter, at.block()));
          for (uint32_t e = 0; e < kQuad; ++e)
            next.v[e] = none[e] ? next.v[e] : fma(c.v[e], z.v[e], next.v[e]);
        }
        if constexpr (kMore == kAll)
          if (args.end != End::kNone)
            for (uint32_t e = 0; e < kQuad; ++e)
              next.v[e] = ended(args.end, next.v[e], args.low, args.high);
        out.store(at, next);
      });
}

// A kernel of its own for rows without addresses: sharing one costs it an instruction an element.
template <class Score, bool kVector, bool kAddressed>
__global__ void __launch_bounds__(kThreads) affine_kernel(AffineArgs args) {
  NoiseKey key = args.key;
  if (!kAddressed) key.addresses = nullptr;
  const Coefficients k = {args.a, args.b, args.c, 0.0f, 0.0f};
  if (has_noise(k))
    each_row(args.rows,
             [&](uint64_t row) { step_row<Score, kVector, true, kNothing>(args, key, row, k); });
  else
    each_row(args.rows,
             [&](uint64_t row) { step_row<Score, kVector, false, kNothing>(args, key, row, k); });
}

template <class Score, bool kVector, int kMore>
__global__ void __launch_bounds__(kThreads) table_kernel(TableArgs args) {
  NoiseKey key = args.key;
  uint64_t line = 0;
  bool inside = true;
  if (args.step) {
    line = uint64_t(*args.step);
    inside = line < args.lines;
    key.draw += uint32_t(line);
  }
  each_row(args.rows, [&](uint64_t row) {
    const float* from = args.table + (args.per_row ? row : line) * args.columns;
    const Coefficients k = inside ? read_line(from, kMore != kNothing && args.known)
                                  : Coefficients{NAN, NAN, NAN, NAN, NAN};
    if (has_noise(k))
      step_row<Score, kVector, true, kMore>(args, key, row, k);
    else
      step_row<Score, kVector, false, kMore>(args, key, row, k);
  });
}

}  // namespace

void cuda::affine_step(const AffineArgs& args, const DeviceAndStream& target) {
  with_dtype(args.score_dtype, args.score, [&](auto* score) {
    using Score = ElementOf<decltype(score)>;
    const bool vector = whole_quads(args.elements, args.x, args.out, score);
    const auto kernel =
        args.key.addresses
            ? (vector ? affine_kernel<Score, true, true> : affine_kernel<Score, false, true>)
            : (vector ? affine_kernel<Score, true, false> : affine_kernel<Score, false, false>);
    launch("affine_step", kernel, grid_of_quads(args, target), target, args);
  });
}

void cuda::table_step(const TableArgs& args, const DeviceAndStream& target) {
  with_dtype(args.score_dtype, args.score, [&](auto* score) {
    using Score = ElementOf<decltype(score)>;
    const bool vector = whole_quads(args.elements, args.x, args.out, score, args.known, args.mask,
                                    args.precondition);
    const auto kernel = [&](auto more) {
      return vector ? table_kernel<Score, true, more> : table_kernel<Score, false, more>;
    };
    const auto chosen = args.precondition || args.end != End::kNone
                            ? kernel(std::integral_constant<int, kAll>())
                        : args.known ? kernel(std::integral_constant<int, kKnown>())
                                     : kernel(std::integral_constant<int, kNothing>());
    launch("table_step", chosen, grid_of_quads(args, target), target, args);
  });
}

}  // namespace sk

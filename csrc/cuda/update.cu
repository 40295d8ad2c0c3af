// The affine step x <- a x + b score + c z.
#include "../update.h"
#include "launch.h"

namespace sk {
namespace {

struct Coefficients {
  float a, b, c, scale, spread;
};

__device__ __forceinline__ Quad combine(const Quad& x, const Quad& score, const Coefficients& k) {
  const Pair a(k.a), b(k.b);
  const Pair low = affine(a, {x.v[0], x.v[1]}, b, {score.v[0], score.v[1]});
  const Pair high = affine(a, {x.v[2], x.v[3]}, b, {score.v[2], score.v[3]});
  return {{low.a, low.b, high.a, high.b}};
}

// What is known of a batch, or nothing at all.
struct Nothing {
  static constexpr bool kSome = false;
};
struct Known {
  static constexpr bool kSome = true;
  const float* known;
  const uint8_t* mask;
};

template <class Score, bool kVector, bool kNoise, class Kept>
__device__ __forceinline__ void step_row(const AffineArgs& args, const NoiseKey& key, uint64_t row,
                                         const Coefficients& k, const Kept& kept) {
  const uint64_t elements = args.elements;
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
      Quad next = combine(xs[i], to_float(scores[i]), k), spread = {{k.c, k.c, k.c, k.c}};
      if constexpr (Kept::kSome) {
        const Quad known = load<kVector>(kept.known + row * elements, quad, i * kWarp, elements);
        const Four<uint8_t> mask =
            load<kVector>(kept.mask + row * elements, quad, i * kWarp, elements);
        for (uint32_t e = 0; e < kQuad; ++e) {
          next.v[e] = mask.v[e] ? k.scale * known.v[e] : next.v[e];
          spread.v[e] = mask.v[e] ? k.spread : k.c;
        }
      }
      if (kNoise) {
        const Quad z = NormalQuads::of(words_of(key, row, quad + i * kWarp));
        for (uint32_t e = 0; e < kQuad; ++e) {
          // There may be noise for one of the known and the other elements alone.
          const bool none = Kept::kSome && spread.v[e] == 0.0f;
          next.v[e] = none ? next.v[e] : fma(spread.v[e], z.v[e], next.v[e]);
        }
      }
      store<kVector>(out, quad, i * kWarp, elements, next);
    }
  });
}

template <class Score, bool kVector>
__global__ void __launch_bounds__(kThreads) affine_kernel(AffineArgs args) {
  const Coefficients k = {args.a, args.b, args.c, 0.0f, 0.0f};
  if (k.c == 0.0f)
    each_row(args.rows, [&](uint64_t row) {
      step_row<Score, kVector, false>(args, args.key, row, k, Nothing{});
    });
  else
    each_row(args.rows, [&](uint64_t row) {
      step_row<Score, kVector, true>(args, args.key, row, k, Nothing{});
    });
}

__device__ __forceinline__ Coefficients read(const float* line, bool scaled) {
  return {line[0], line[1], line[2], scaled ? line[3] : 0.0f, scaled ? line[4] : 0.0f};
}

template <class Score, bool kVector, class Kept>
__global__ void __launch_bounds__(kThreads)
    table_kernel(AffineArgs args, StepTable table, Kept kept) {
  NoiseKey key = args.key;
  uint64_t line = 0;
  bool inside = true;
  if (table.step) {
    line = uint64_t(*table.step);
    inside = line < table.lines;
    key.draw += uint32_t(line);
  }
  each_row(args.rows, [&](uint64_t row) {
    const float* place = table.table + (table.per_row ? row : line) * table.columns;
    const Coefficients k =
        inside ? read(place, Kept::kSome) : Coefficients{NAN, NAN, NAN, NAN, NAN};
    if (k.c == 0.0f && k.spread == 0.0f)
      step_row<Score, kVector, false>(args, key, row, k, kept);
    else
      step_row<Score, kVector, true>(args, key, row, k, kept);
  });
}

template <class Score>
bool vectors(const AffineArgs& args) {
  return args.elements % kQuad == 0 && whole_quads(args.x) && whole_quads(args.out) &&
         whole_quads(static_cast<const Score*>(args.score));
}

}  // namespace

void cuda::affine_step(const AffineArgs& args, const Place& place) {
  if (args.rows == 0 || args.elements == 0) return;
  const DeviceGuard guard(place.device);
  with_dtype(args.score_dtype, [&](auto* null) {
    using Score = std::remove_pointer_t<decltype(null)>;
    launch("affine_step",
           vectors<Score>(args) ? affine_kernel<Score, true> : affine_kernel<Score, false>,
           grid_of_turns(args.rows, args.elements, place), args);
  });
}

void cuda::table_step(const AffineArgs& args, const StepTable& table, const Place& place) {
  if (args.rows == 0 || args.elements == 0) return;
  const DeviceGuard guard(place.device);
  with_dtype(args.score_dtype, [&](auto* null) {
    using Score = std::remove_pointer_t<decltype(null)>;
    const auto grid = grid_of_turns(args.rows, args.elements, place);
    if (!table.known) {
      launch("table_step",
             vectors<Score>(args) ? table_kernel<Score, true, Nothing>
                                  : table_kernel<Score, false, Nothing>,
             grid, args, table, Nothing{});
      return;
    }
    const bool vector = vectors<Score>(args) && whole_quads(table.known) && whole_quads(table.mask);
    launch("table_step",
           vector ? table_kernel<Score, true, Known> : table_kernel<Score, false, Known>, grid,
           args, table, Known{table.known, table.mask});
  });
}

}  // namespace sk

// Denoising score matching: noisy data, the loss of each sample, its gradient by the score.
#include "../dsm.h"

#include <vector>

#include "score.h"

namespace sk {
namespace SK_ISA {

namespace {

// Sums run over 16 fixed lanes and are joined in fp64 in a fixed order: the same bits for any
// instruction set and number of threads.
constexpr uint64_t kSumLanes = 16;

SK_INLINE void perturb_row(float* out, const float* x, const float* z, uint64_t count,
                           float sigma) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = perturbed(x[i], sigma, z[i]);
}

// z becomes the residual; returns the sum of its squares.
SK_INLINE double residual_row(float* z, const float* score, uint64_t count, float sigma) {
  alignas(64) float sums[kSumLanes] = {};
  const auto add = [&](uint64_t i, uint64_t lane) SK_LAMBDA_INLINE {
    z[i] = dsm_residual(score[i], sigma, z[i]);
    sums[lane] = fma(z[i], z[i], sums[lane]);
  };
  uint64_t i = 0;
#if defined(SK_VECTOR)
  constexpr uint64_t kParts = kSumLanes / kLanes;
  F wide[2] = {F(0.0f), F(0.0f)};
  static_assert(kParts <= 2);
  for (; i + kSumLanes <= count; i += kSumLanes)
    for (uint64_t part = 0; part < kParts; ++part) {
      float* at = z + i + part * kLanes;
      const F r = dsm_residual(Vector::load(score + (at - z)), F(sigma), Vector::load(at));
      wide[part] = fma(r, r, wide[part]);
      Vector::store(at, r);
    }
  for (uint64_t part = 0; part < kParts; ++part) Vector::store(sums + part * kLanes, wide[part]);
#else
  for (; i + kSumLanes <= count; i += kSumLanes)
    for (uint64_t lane = 0; lane < kSumLanes; ++lane) add(i + lane, lane);
#endif
  for (uint64_t lane = 0; i + lane < count; ++lane) add(i + lane, lane);
  double total = 0.0;
  for (const float sum : sums) total += sum;
  return total;
}

SK_INLINE void scale_row(float* out, const float* residual, uint64_t count, float factor) {
#pragma omp simd
  for (uint64_t i = 0; i < count; ++i) out[i] = factor * residual[i];
}

// Rows of a tile, one after the other: body(row, first element inside the tile, count).
template <class Body>
SK_INLINE void for_each_row(const Tile& tile, const Body& body) {
  const uint64_t count = tile.count / tile.rows;
  for (uint64_t r = 0; r < tile.rows; ++r) body(tile.row + r, r * count, count);
}

SK_INLINE float weight_of(const DsmArgs& args, uint64_t row) {
  return args.weight ? args.weight[row] : 1.0f;
}

template <class Args, class Out>
SK_INLINE void noise_ahead(const Args& args, const Tile& tile, float* z, const void* in,
                           uint64_t in_size, Out* out) {
  const char* from = static_cast<const char*>(in) + tile.offset * in_size;
  fill_tile<NormalMap>(z, args.key, args.elements, tile,
                       [=](uint64_t first, uint64_t count) SK_LAMBDA_INLINE {
                         if (out) prefetch<true>(out + tile.offset + first, count * sizeof(Out));
                         prefetch<false>(from + first * in_size, count * in_size);
                       });
}

}  // namespace

void perturb(const PerturbArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer];
    noise_ahead(args, tile, z, args.x, sizeof(float), args.out);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const uint64_t at = tile.offset + first;
      perturb_row(args.out + at, args.x + at, z + first, count, args.sigma[row]);
    });
  });
}

void dsm_loss(const DsmArgs& args) {
  const Tiling tiling(args.rows, args.elements);
  const uint64_t pieces = tiling.tiles_per_row;
  std::vector<double> sums(args.rows * pieces);
  double* const partial = sums.data();
  for_each_tile(args.rows, args.elements, [args, pieces, partial](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    noise_ahead(args, tile, z, args.score, size_of(args.score_dtype), args.gradient);
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const float sigma = args.sigma[row];
      partial[row * pieces + tile.first / kTile] =
          residual_row(z + first, score + first, count, sigma);
      if (args.gradient)
        scale_row(args.gradient + tile.offset + first, z + first, count,
                  weight_of(args, row) * sigma);
    });
  });
  for (uint64_t row = 0; row < args.rows; ++row) {
    double total = 0.0;
    for (uint64_t i = 0; i < pieces; ++i) total += partial[row * pieces + i];
    args.loss[row] = float(0.5 * weight_of(args, row) * total);
  }
}

void dsm_gradient(const DsmArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    alignas(64) float z[kTileBuffer], converted[kTile];
    noise_ahead(args, tile, z, args.score, size_of(args.score_dtype), args.gradient);
    const float* score = score_tile(args.score, args.score_dtype, tile, converted);
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      const float sigma = args.sigma[row];
      residual_row(z + first, score + first, count, sigma);
      scale_row(args.gradient + tile.offset + first, z + first, count,
                args.upstream[row] * (weight_of(args, row) * sigma));
    });
  });
}

}  // namespace SK_ISA
}  // namespace sk

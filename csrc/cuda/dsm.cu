// Denoising score matching: noisy data, the loss of each sample, its gradient by the score. The
// gradient is computed from the score in the backward pass: reading that again costs less than
// keeping anything.
#include "../dsm.h"
#include "sums.h"

namespace sk {
namespace {

template <bool kVector>
__global__ void __launch_bounds__(kThreads) perturb_kernel(PerturbArgs args) {
  const uint64_t elements = args.elements;
  each_row(args.rows, [&](uint64_t row) {
    const float* x = args.x + row * elements;
    float* out = args.out + row * elements;
    const float sigma = args.sigma[row];
    each_turn(walk_of_grid(elements), [&](auto count, uint32_t quad) {
      Quad noisy[count.value];
      for (int i = 0; i < count.value; ++i) noisy[i] = load<kVector>(x, quad, i * kWarp, elements);
      for (int i = 0; i < count.value; ++i) {
        const Quad z = NormalQuads::of(words_of(args.key, row, quad + i * kWarp));
        for (uint32_t e = 0; e < kQuad; ++e)
          noisy[i].v[e] = perturbed(noisy[i].v[e], sigma, z.v[e]);
        store<kVector>(out, quad, i * kWarp, elements, noisy[i]);
      }
    });
  });
}

__device__ __forceinline__ float weight_of(const DsmArgs& args, uint64_t row) {
  return args.weight ? args.weight[row] : 1.0f;
}

// sigma score + z; elements past the row's end have residual 0.
template <bool kVector>
__device__ __forceinline__ Quad residual_of(const Quad& score, float sigma, const NoiseKey& key,
                                            uint64_t row, uint32_t quad, uint64_t elements) {
  Quad r = NormalQuads::of(words_of(key, row, quad));
  for (uint32_t e = 0; e < kQuad; ++e) {
    r.v[e] = dsm_residual(score.v[e], sigma, r.v[e]);
    if (!kVector && uint64_t(quad) * kQuad + e >= elements) r.v[e] = 0.0f;
  }
  return r;
}

__device__ __forceinline__ float loss_of(const DsmArgs& args, uint64_t row, double squares) {
  return float(0.5 * weight_of(args, row) * squares);
}

// The losses, if rows are of one piece, or else the sums of squares of the pieces.
template <class Score, bool kVector>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(DsmArgs args, float* partial, uint32_t pieces) {
  const uint64_t elements = args.elements;
  sum_pieces<1>(
      args.rows, elements, pieces,
      [&](uint64_t row, Walk walk, float (&sum)[1]) {
        const Score* score = static_cast<const Score*>(args.score) + row * elements;
        const float sigma = args.sigma[row];
        each_turn(walk, [&](auto count, uint32_t quad) {
          Four<Score> scores[count.value];
          for (int i = 0; i < count.value; ++i)
            scores[i] = load<kVector>(score, quad, i * kWarp, elements);
          for (int i = 0; i < count.value; ++i) {
            const Quad r = residual_of<kVector>(to_float(scores[i]), sigma, args.key, row,
                                                quad + i * kWarp, elements);
            for (uint32_t e = 0; e < kQuad; ++e) sum[0] = fma(r.v[e], r.v[e], sum[0]);
          }
        });
      },
      [&](uint64_t row, uint32_t piece, float (&sum)[1]) {
        if (pieces == 1)
          args.loss[row] = loss_of(args, row, sum[0]);
        else
          partial[row * pieces + piece] = sum[0];
      });
}

__global__ void __launch_bounds__(kWarp)
    total_kernel(DsmArgs args, const float* partial, uint32_t pieces) {
  for (uint64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const double squares = add_pieces(partial + row * pieces, pieces);
    if (threadIdx.x == 0) args.loss[row] = loss_of(args, row, squares);
  }
}

// In the score's dtype.
template <class Score, bool kVector>
__global__ void __launch_bounds__(kThreads) gradient_kernel(DsmArgs args, Score* gradient) {
  const uint64_t elements = args.elements;
  each_row(args.rows, [&](uint64_t row) {
    const Score* score = static_cast<const Score*>(args.score) + row * elements;
    Score* out = gradient + row * elements;
    const float sigma = args.sigma[row];
    const float scale = args.upstream[row] * (weight_of(args, row) * sigma);
    each_turn(walk_of_grid(elements), [&](auto count, uint32_t quad) {
      Four<Score> scores[count.value];
      for (int i = 0; i < count.value; ++i)
        scores[i] = load<kVector>(score, quad, i * kWarp, elements);
      for (int i = 0; i < count.value; ++i) {
        Quad r = residual_of<true>(to_float(scores[i]), sigma, args.key, row, quad + i * kWarp,
                                   elements);
        for (uint32_t e = 0; e < kQuad; ++e) r.v[e] = scale * r.v[e];
        store<kVector>(out, quad, i * kWarp, elements, from_float<Score>(r));
      }
    });
  });
}

}  // namespace

void cuda::perturb(const PerturbArgs& args, const Place& place) {
  if (args.rows == 0 || args.elements == 0) return;
  const DeviceGuard guard(place.device);
  const bool vector = args.elements % kQuad == 0 && whole_quads(args.x) && whole_quads(args.out);
  launch("perturb", vector ? perturb_kernel<true> : perturb_kernel<false>,
         grid_of_turns(args.rows, args.elements, place), args);
}

void cuda::dsm_loss(const DsmArgs& args, float* partial, const Place& place) {
  if (args.rows == 0 || args.elements == 0) return;
  const DeviceGuard guard(place.device);
  const uint64_t pieces = pieces_of(args.elements);
  with_dtype(args.score_dtype, [&](auto* null) {
    using Score = std::remove_pointer_t<decltype(null)>;
    const bool vector =
        args.elements % kQuad == 0 && whole_quads(static_cast<const Score*>(args.score));
    launch("dsm_loss", vector ? loss_kernel<Score, true> : loss_kernel<Score, false>,
           grid_of(args.rows, args.elements, pieces, place), args, partial, pieces);
  });
  if (pieces > 1)
    launch("dsm_loss", total_kernel, grid_of_rows(args.rows, place), args, partial, pieces);
}

void cuda::dsm_gradient(const DsmArgs& args, const Place& place) {
  if (args.rows == 0 || args.elements == 0) return;
  const DeviceGuard guard(place.device);
  with_dtype(args.score_dtype, [&](auto* null) {
    using Score = std::remove_pointer_t<decltype(null)>;
    Score* gradient = reinterpret_cast<Score*>(args.gradient);
    const bool vector = args.elements % kQuad == 0 && whole_quads(gradient) &&
                        whole_quads(static_cast<const Score*>(args.score));
    launch("dsm_gradient", vector ? gradient_kernel<Score, true> : gradient_kernel<Score, false>,
           grid_of_turns(args.rows, args.elements, place), args, gradient);
  });
}

uint64_t cuda::partials(uint64_t elements) { return elements ? pieces_of(elements) : 0; }

}  // namespace sk

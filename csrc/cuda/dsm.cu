// Denoising score matching: noisy data, the loss of each sample, its gradient by the score. The
// gradient is computed from the score in the backward pass: reading that again costs less than
// keeping anything.
#include "../dsm.h"
#include "sums.h"

namespace sk {
namespace {

template <bool kVector>
__global__ void __launch_bounds__(kThreads) perturb_kernel(PerturbArgs args) {
  each_row(args.rows, [&](uint64_t row) {
    const Place place(args.key, row, args.elements);
    const Row<kVector, const float> x(args.x, place);
    const Row<kVector, float> out(args.out, place);
    const float sigma = place.checked(args.sigma[row]);
    each_quad(
        place, range_of_grid(args.elements), [&](At at) { return x.load(at); },
        [&](At at, Quad noisy) {
          const Quad z = values_of<NormalMap>(words_of(args.key, place.counter, at.block()));
          for (uint32_t e = 0; e < kQuad; ++e) noisy.v[e] = perturbed(noisy.v[e], sigma, z.v[e]);
          out.store(at, noisy);
        });
  });
}

// body(at, residuals) for the quads of a range; elements past the row's end have residual 0.
template <class Score, bool kVector, class Body>
__device__ __forceinline__ void each_residual(const DsmArgs& args, const Place& place, Range range,
                                              const Body& body) {
  const Row<kVector, const Score> scores(static_cast<const Score*>(args.score), place);
  const float sigma = place.checked(args.sigma[place.row]);
  each_quad(
      place, range, [&](At at) { return scores.load(at); },
      [&](At at, const Four<Score>& loaded) {
        const Quad score = to_floats(loaded);
        Quad r = values_of<NormalMap>(words_of(args.key, place.counter, at.block()));
        for (uint32_t e = 0; e < kQuad; ++e) {
          r.v[e] = dsm_residual(score.v[e], sigma, r.v[e]);
          if (!kVector && at.element() + e >= place.end()) r.v[e] = 0.0f;
        }
        body(at, r);
      });
}

// The losses, if rows are of one chunk, or else the sums of squares of the chunks.
template <class Score, bool kVector>
__global__ void __launch_bounds__(kThreads) loss_kernel(DsmArgs args, uint32_t chunks) {
  sum_chunks<1>(
      args.rows, args.elements, chunks,
      [&](uint64_t row, Range range, float (&sum)[1]) {
        const Place place(args.key, row, args.elements);
        each_residual<Score, kVector>(args, place, range, [&](At, const Quad& r) {
          for (uint32_t e = 0; e < kQuad; ++e) sum[0] = fma(r.v[e], r.v[e], sum[0]);
        });
      },
      [&](uint64_t row, uint32_t chunk, float (&sum)[1]) {
        if (chunks == 1)
          args.loss[row] = dsm_loss(args, row, sum[0]);
        else
          args.partial[row * chunks + chunk] = sum[0];
      });
}

__global__ void __launch_bounds__(kWarp) total_kernel(DsmArgs args, uint32_t chunks) {
  add_chunks(args.rows, args.partial, chunks,
             [&](uint64_t row, double squares) { args.loss[row] = dsm_loss(args, row, squares); });
}

// In the score's dtype.
template <class Score, bool kVector>
__global__ void __launch_bounds__(kThreads) gradient_kernel(DsmArgs args) {
  each_row(args.rows, [&](uint64_t row) {
    const Place place(args.key, row, args.elements);
    const Row<kVector, Score> out(reinterpret_cast<Score*>(args.gradient), place);
    const float scale = dsm_gradient_scale(args, row);
    each_residual<Score, kVector>(args, place, range_of_grid(args.elements), [&](At at, Quad r) {
      for (uint32_t e = 0; e < kQuad; ++e) r.v[e] = scale * r.v[e];
      out.store(at, from_floats<Score>(r));
    });
  });
}

}  // namespace

void cuda::perturb(const PerturbArgs& args, const DeviceAndStream& target) {
  const bool vector = whole_quads(args.elements, args.x, args.out);
  launch("perturb", vector ? perturb_kernel<true> : perturb_kernel<false>,
         grid_of_quads(args, target), target, args);
}

void cuda::dsm(const DsmArgs& args, const DeviceAndStream& target) {
  const uint64_t chunks = chunks_of(args.elements);
  with_dtype(args.score_dtype, args.score, [&](auto* score) {
    using Score = ElementOf<decltype(score)>;
    bool vector = whole_quads(args.elements, score);
    if (args.loss)
      launch("dsm_loss", vector ? loss_kernel<Score, true> : loss_kernel<Score, false>,
             grid_of(args.rows, args.elements, chunks, target.device), target, args, chunks);
    vector = vector && whole_quads(args.elements, reinterpret_cast<Score*>(args.gradient));
    if (args.gradient)
      launch("dsm_gradient", vector ? gradient_kernel<Score, true> : gradient_kernel<Score, false>,
             grid_of_quads(args, target), target, args);
  });
  if (args.loss && chunks > 1)
    launch("dsm_loss", total_kernel, grid_of_warps(args.rows), target, args, chunks);
}

uint64_t cuda::partials(uint64_t elements) { return elements ? chunks_of(elements) : 0; }

}  // namespace sk

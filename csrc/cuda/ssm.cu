// Sliced score matching: sums over a probe v that is made in the kernel, and the probe scaled.
#include "../ssm.h"
#include "sums.h"

namespace sk {
namespace {

// The sums v.v, v.a, v.b and a.a of each row, or of its chunks: [4, rows] or [4, rows, chunks].
// One block a multiprocessor at least: for more, ptxas would spill.
template <class Map, class T, bool kVector, bool kDifferences>
__global__ void __launch_bounds__(kThreads, 1)
    sums_kernel(ProbeArgs args, float* to, uint32_t chunks) {
  struct Inputs {
    Four<T> a, b;
  };
  sum_chunks<kProbeSums>(
      args.rows, args.elements, chunks,
      [&](uint64_t row, Range range, float (&sums)[kProbeSums]) {
        const Place place(args.key, row, args.elements);
        const Row<kVector, const T> as(static_cast<const T*>(args.a), place);
        // Without b its sum is not asked for: a stands in.
        const Row<kVector, const T> bs(static_cast<const T*>(args.b ? args.b : args.a), place);
        each_quad(
            place, range, [&](At at) { return Inputs{as.load(at), bs.load(at)}; },
            [&](At at, const Inputs& in) {
              Quad v = values_of<Map>(words_of(args.key, place.counter, at.block()));
              const Quad a = to_floats(in.a), b = to_floats(in.b);
              for (uint32_t e = 0; e < kQuad; ++e) {
                if (!kVector && at.element() + e >= place.end()) v.v[e] = 0.0f;
                const float p = kDifferences ? mean_of(a.v[e], b.v[e]) : a.v[e];
                const float q = kDifferences ? a.v[e] - b.v[e] : b.v[e];
                sums[kVV] = fma(v.v[e], v.v[e], sums[kVV]);
                sums[kVA] = fma(v.v[e], p, sums[kVA]);
                sums[kVB] = fma(v.v[e], q, sums[kVB]);
                sums[kAA] = fma(p, p, sums[kAA]);
              }
            });
        for (float& sum : sums) sum = place.checked(sum);
      },
      [&](uint64_t row, uint32_t chunk, float (&sums)[kProbeSums]) {
        if (!args.b) sums[kVB] = 0.0f;
        for (int k = 0; k < kProbeSums; ++k) to[(k * args.rows + row) * chunks + chunk] = sums[k];
      });
}

__global__ void __launch_bounds__(kWarp) total_kernel(ProbeArgs args, uint32_t chunks) {
  add_chunks(kProbeSums * args.rows, args.partial, chunks,
             [&](uint64_t i, double sum) { args.out[i] = float(sum); });
}

// factor v or, with x, the pair x + factor v, x - factor v.
template <class Map, bool kVector, bool kPair>
__global__ void __launch_bounds__(kThreads) scale_kernel(ProbeArgs args) {
  each_row(args.rows, [&](uint64_t row) {
    const Place place(args.key, row, args.elements);
    // Of the pair alone; arithmetic on a null pointer is undefined.
    const Row<kVector, const float> x(kPair ? args.x : args.out, place);
    const Row<kVector, float> above(args.out, place);
    const Row<kVector, float> below(args.out + args.rows * args.elements, place);
    const float factor = place.checked(args.factor[row]);
    each_quad(
        place, range_of_grid(args.elements), [&](At at) { return kPair ? x.load(at) : Quad{}; },
        [&](At at, const Quad& center) {
          const Quad v = values_of<Map>(words_of(args.key, place.counter, at.block()));
          Quad up, down;
          for (uint32_t e = 0; e < kQuad; ++e) {
            up.v[e] = kPair ? shifted(center.v[e], factor, v.v[e]) : factor * v.v[e];
            down.v[e] = kPair ? shifted(center.v[e], -factor, v.v[e]) : 0.0f;
          }
          above.store(at, up);
          if (kPair) below.store(at, down);
        });
  });
}

template <class Map>
void sums_with(const ProbeArgs& args, const DeviceAndStream& target) {
  const uint64_t chunks = chunks_of(args.elements);
  float* to = chunks == 1 ? args.out : args.partial;
  with_dtype(args.dtype, args.a, [&](auto* a) {
    using T = ElementOf<decltype(a)>;
    const bool vector = whole_quads(args.elements, a, static_cast<const T*>(args.b));
    const auto kernel =
        args.differences
            ? (vector ? sums_kernel<Map, T, true, true> : sums_kernel<Map, T, false, true>)
            : (vector ? sums_kernel<Map, T, true, false> : sums_kernel<Map, T, false, false>);
    launch("probe_sums", kernel, grid_of(args.rows, args.elements, chunks, target.device), target,
           args, to, chunks);
  });
  if (chunks > 1)
    launch("probe_sums", total_kernel, grid_of_warps(kProbeSums * args.rows), target, args, chunks);
}

template <class Map>
void scale_with(const ProbeArgs& args, const DeviceAndStream& target) {
  const bool vector = whole_quads(args.elements, args.out, args.x);
  const auto kernel =
      args.x ? (vector ? scale_kernel<Map, true, true> : scale_kernel<Map, false, true>)
             : (vector ? scale_kernel<Map, true, false> : scale_kernel<Map, false, false>);
  launch("probe_scale", kernel, grid_of_quads(args, target), target, args);
}

}  // namespace

void cuda::probe(const ProbeArgs& args, const DeviceAndStream& target) {
  const bool signs = args.kind == Kind::kRademacher;
  if (args.factor)
    signs ? scale_with<RademacherMap>(args, target) : scale_with<NormalMap>(args, target);
  else
    signs ? sums_with<RademacherMap>(args, target) : sums_with<NormalMap>(args, target);
}

}  // namespace sk

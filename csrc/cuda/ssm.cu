// Sliced score matching: sums over a probe v that is made in the kernel, and the probe scaled.
#include "../ssm.h"
#include "sums.h"

namespace sk {
namespace {

// The sums v.v, v.a, v.b and a.a of each row, or of its pieces: [4, rows] or [4, rows, pieces].
template <class Noise, class T, bool kVector, bool kDifferences>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(ProbeArgs args, float* to, uint32_t pieces) {
  const uint64_t elements = args.elements;
  sum_pieces<kProbeSums>(
      args.rows, elements, pieces,
      [&](uint64_t row, Walk walk, float (&sums)[kProbeSums]) {
        const T* a = static_cast<const T*>(args.a) + row * elements;
        // Without b its sum is not asked for: a stands in.
        const T* b = args.b ? static_cast<const T*>(args.b) + row * elements : a;
        each_turn(walk, [&](auto count, uint32_t quad) {
          Four<T> as[count.value], bs[count.value];
          for (int i = 0; i < count.value; ++i) {
            as[i] = load<kVector>(a, quad, i * kWarp, elements);
            bs[i] = load<kVector>(b, quad, i * kWarp, elements);
          }
          for (int i = 0; i < count.value; ++i) {
            Quad v = Noise::of(words_of(args.key, row, quad + i * kWarp));
            const Quad x = to_float(as[i]), y = to_float(bs[i]);
            for (uint32_t e = 0; e < kQuad; ++e) {
              if (!kVector && (uint64_t(quad) + i * kWarp) * kQuad + e >= elements) v.v[e] = 0.0f;
              const float p = kDifferences ? mean_of(x.v[e], y.v[e]) : x.v[e];
              const float q = kDifferences ? x.v[e] - y.v[e] : y.v[e];
              sums[kVV] = fma(v.v[e], v.v[e], sums[kVV]);
              sums[kVA] = fma(v.v[e], p, sums[kVA]);
              sums[kVB] = fma(v.v[e], q, sums[kVB]);
              sums[kAA] = fma(p, p, sums[kAA]);
            }
          }
        });
      },
      [&](uint64_t row, uint32_t piece, float (&sums)[kProbeSums]) {
        if (!args.b) sums[kVB] = 0.0f;
        for (int k = 0; k < kProbeSums; ++k) to[(k * args.rows + row) * pieces + piece] = sums[k];
      });
}

__global__ void __launch_bounds__(kWarp)
    total_kernel(float* out, uint64_t count, const float* partial, uint32_t pieces) {
  for (uint64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const double sum = add_pieces(partial + i * pieces, pieces);
    if (threadIdx.x == 0) out[i] = float(sum);
  }
}

// factor v or, with x, the pair x + factor v, x - factor v.
template <class Noise, bool kVector, bool kPair>
__global__ void __launch_bounds__(kThreads) scale_kernel(ProbeArgs args) {
  const uint64_t elements = args.elements;
  each_row(args.rows, [&](uint64_t row) {
    const float* x = kPair ? args.x + row * elements : nullptr;
    float* above = args.out + row * elements;
    float* below = args.out + (args.rows + row) * elements;
    const float factor = args.factor[row];
    each_turn(walk_of_grid(elements), [&](auto count, uint32_t quad) {
      Quad xs[count.value];
      if (kPair)
        for (int i = 0; i < count.value; ++i) xs[i] = load<kVector>(x, quad, i * kWarp, elements);
      for (int i = 0; i < count.value; ++i) {
        Quad up = Noise::of(words_of(args.key, row, quad + i * kWarp)), down;
        for (uint32_t e = 0; e < kQuad; ++e) {
          const float v = up.v[e];
          up.v[e] = kPair ? shifted(xs[i].v[e], factor, v) : factor * v;
          if (kPair) down.v[e] = shifted(xs[i].v[e], -factor, v);
        }
        store<kVector>(above, quad, i * kWarp, elements, up);
        if (kPair) store<kVector>(below, quad, i * kWarp, elements, down);
      }
    });
  });
}

template <class Noise>
void sums_with(const ProbeArgs& args, float* partial, const Place& place) {
  const uint64_t pieces = pieces_of(args.elements);
  float* to = pieces == 1 ? args.out : partial;
  with_dtype(args.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const bool vector = args.elements % kQuad == 0 && whole_quads(static_cast<const T*>(args.a)) &&
                        whole_quads(static_cast<const T*>(args.b));
    const auto kernel =
        args.differences
            ? (vector ? sums_kernel<Noise, T, true, true> : sums_kernel<Noise, T, false, true>)
            : (vector ? sums_kernel<Noise, T, true, false> : sums_kernel<Noise, T, false, false>);
    launch("probe_sums", kernel, grid_of(args.rows, args.elements, pieces, place), args, to,
           pieces);
  });
  if (pieces > 1)
    launch("probe_sums", total_kernel, grid_of_rows(kProbeSums * args.rows, place), args.out,
           kProbeSums * args.rows, partial, pieces);
}

template <class Noise>
void scale_with(const ProbeArgs& args, const Place& place) {
  const bool vector = args.elements % kQuad == 0 && whole_quads(args.out) && whole_quads(args.x);
  const auto kernel =
      args.x ? (vector ? scale_kernel<Noise, true, true> : scale_kernel<Noise, false, true>)
             : (vector ? scale_kernel<Noise, true, false> : scale_kernel<Noise, false, false>);
  launch("probe_scale", kernel, grid_of_turns(args.rows, args.elements, place), args);
}

}  // namespace

void cuda::probe(const ProbeArgs& args, float* partial, const Place& place) {
  if (args.rows == 0 || args.elements == 0) return;
  const DeviceGuard guard(place.device);
  const bool signs = args.kind == Kind::kRademacher;
  if (args.factor)
    signs ? scale_with<RademacherQuads>(args, place) : scale_with<NormalQuads>(args, place);
  else
    signs ? sums_with<RademacherQuads>(args, partial, place)
          : sums_with<NormalQuads>(args, partial, place);
}

}  // namespace sk

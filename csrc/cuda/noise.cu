// Materialised noise: words, normals, uniforms, random signs.
#include "launch.h"

namespace sk {
namespace {

struct WordQuads {
  static __device__ __forceinline__ Four<int64_t> of(const Words& words) {
    return {{words.w[0], words.w[1], words.w[2], words.w[3]}};
  }
};

template <class Noise, bool kVector, class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(FillArgs args) {
  each_row(args.rows, [&](uint64_t row) {
    T* out = static_cast<T*>(args.out) + row * args.elements;
    each_turn(walk_of_grid(args.elements), [&](auto count, uint32_t quad) {
      for (int i = 0; i < count.value; ++i) {
        const Words words = words_of(args.key, row, quad + i * kWarp);
        store<kVector>(out, quad, i * kWarp, args.elements, Noise::of(words));
      }
    });
  });
}

template <class Noise, class T>
void fill_with(const FillArgs& args, const Place& place) {
  const bool vector = args.elements % kQuad == 0 && whole_quads(static_cast<T*>(args.out));
  launch("fill", vector ? fill_kernel<Noise, true, T> : fill_kernel<Noise, false, T>,
         grid_of_turns(args.rows, args.elements, place), args);
}

}  // namespace

void cuda::fill(const FillArgs& args, const Place& place) {
  if (args.rows == 0 || args.elements == 0) return;
  const DeviceGuard guard(place.device);
  switch (args.kind) {
    case Kind::kWords:
      return fill_with<WordQuads, int64_t>(args, place);
    case Kind::kNormal:
      return fill_with<NormalQuads, float>(args, place);
    case Kind::kUniform:
      return fill_with<UniformQuads, float>(args, place);
    case Kind::kRademacher:
      return fill_with<RademacherQuads, float>(args, place);
  }
}

}  // namespace sk

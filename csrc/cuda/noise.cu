// Materialised noise: words, normals, uniforms, random signs.
#include "launch.h"

namespace sk {
namespace {

template <class Map, bool kVector, class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(FillArgs args) {
  each_row(args.rows, [&](uint64_t row) {
    const Place place(args.key, row, args.elements);
    const Row<kVector, T> out(static_cast<T*>(args.out), place);
    const Range range = range_of_grid(args.elements);
    const auto none = [](At) { return 0; };
    if (!place.counter.in_range) {
      const T bad = std::is_same_v<T, float> ? T(NAN) : T(-1);
      return each_quad(place, range, none,
                       [&](At at, int) { out.store(at, {{bad, bad, bad, bad}}); });
    }
    each_quad(place, range, none, [&](At at, int) {
      const Words words = words_of(args.key, place.counter, at.block());
      if constexpr (std::is_same_v<Map, WordMap>)
        out.store(at, {{words.w[0], words.w[1], words.w[2], words.w[3]}});
      else
        out.store(at, values_of<Map>(words));
    });
  });
}

template <class Map, class T>
void fill_with(const FillArgs& args, const DeviceAndStream& target) {
  const bool vector = whole_quads(args.elements, static_cast<T*>(args.out));
  launch("fill", vector ? fill_kernel<Map, true, T> : fill_kernel<Map, false, T>,
         grid_of_quads(args, target), target, args);
}

}  // namespace

void cuda::fill(const FillArgs& args, const DeviceAndStream& target) {
  switch (args.kind) {
    case Kind::kWords:
      return fill_with<WordMap, int64_t>(args, target);
    case Kind::kNormal:
      return fill_with<NormalMap, float>(args, target);
    case Kind::kUniform:
      return fill_with<UniformMap, float>(args, target);
    case Kind::kRademacher:
      return fill_with<RademacherMap, float>(args, target);
  }
}

}  // namespace sk

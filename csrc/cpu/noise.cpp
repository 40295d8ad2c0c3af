// Materialised noise: words, normals, uniforms, random signs.
#include <type_traits>

#include "tile.h"

namespace sk {
namespace SK_ISA {

namespace {

template <class Map, class T>
void fill_with(const FillArgs& args) {
  T* out = static_cast<T*>(args.out);
  for_each_tile(args.rows, args.elements, [&](const Tile& tile) {
    alignas(64) float values[kTileBuffer];
    fill_tile<Map>(values, args.key, args.elements, tile);
    for (uint64_t i = 0; i < tile.count; ++i)
      if constexpr (std::is_same_v<T, float>)
        out[tile.offset + i] = values[i];
      else
        out[tile.offset + i] = to_bits(values[i]);
  });
}

}  // namespace

void fill(const FillArgs& args) {
  switch (args.kind) {
    case Kind::kWords:
      return fill_with<WordMap, int64_t>(args);
    case Kind::kNormal:
      return fill_with<NormalMap, float>(args);
    case Kind::kUniform:
      return fill_with<UniformMap, float>(args);
    case Kind::kRademacher:
      return fill_with<RademacherMap, float>(args);
  }
}

}  // namespace SK_ISA
}  // namespace sk

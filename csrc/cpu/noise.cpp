// Materialised noise: words, normals, uniforms, random signs.
#include "tile.h"

namespace sk {
namespace SK_ISA {

namespace {

template <class Map>
void fill_floats(const FillArgs& args) {
  float* out = static_cast<float*>(args.out);
  for_each_tile(args.rows, args.elements, [&](const Tile& tile) {
    alignas(64) float values[kTileBuffer];
    fill_tile<Map>(values, args.key, args.elements, tile);
    memcpy(out + tile.offset, values, tile.count * sizeof(float));
  });
}

void fill_words(const FillArgs& args) {
  int64_t* out = static_cast<int64_t*>(args.out);
  for_each_tile(args.rows, args.elements, [&](const Tile& tile) {
    alignas(64) float values[kTileBuffer];
    fill_tile<WordMap>(values, args.key, args.elements, tile);
    for (uint64_t i = 0; i < tile.count; ++i) out[tile.offset + i] = to_bits(values[i]);
  });
}

}  // namespace

void fill(const FillArgs& args) {
  switch (args.kind) {
    case Kind::kWords:
      return fill_words(args);
    case Kind::kNormal:
      return fill_floats<NormalMap>(args);
    case Kind::kUniform:
      return fill_floats<UniformMap>(args);
    case Kind::kRademacher:
      return fill_floats<RademacherMap>(args);
  }
}

}  // namespace SK_ISA
}  // namespace sk

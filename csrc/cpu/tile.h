// Noise by tiles: a kernel walks its batch in tiles of at most kTile elements, has the noise of a
// tile made in a buffer that stays in the first-level cache, and then runs a plain loop over it,
// which the compiler vectorises. Measured equal to keeping the noise in registers.
//
// A tile is dense in the flattened [rows, elements] batch: a piece of one row, or, when rows are
// too short to fill the vectors, several whole rows.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace sk {
namespace {

constexpr uint64_t kTile = 1024;
// Whole groups of vectors are written, so that up to 127 elements past the tile are touched.
constexpr uint64_t kTileBuffer = kTile + 128;
// Under this many elements a second thread costs more than it saves.
constexpr uint64_t kSerial = 4096;

struct Tile {
  uint64_t row, rows;     // first row, number of rows
  uint64_t first, count;  // first element inside the row, elements in all
  uint64_t offset;        // first element inside the batch
};

struct Tiling {
  uint64_t rows, elements;
  uint64_t rows_per_tile, tiles_per_row, count;

  Tiling(uint64_t rows, uint64_t elements) : rows(rows), elements(elements) {
    const uint64_t blocks = (elements + 3) / 4;
    const bool gather = blocks < kTile / 4 && blocks % 16 != 0;
    rows_per_tile = gather ? kTile / (4 * blocks) : 1;
    tiles_per_row = (elements + kTile - 1) / kTile;
    count = elements == 0 ? 0 : (rows + rows_per_tile - 1) / rows_per_tile * tiles_per_row;
  }

  Tile operator[](uint64_t i) const {
    Tile t;
    t.row = i / tiles_per_row * rows_per_tile;
    t.rows = rows - t.row < rows_per_tile ? rows - t.row : rows_per_tile;
    t.first = i % tiles_per_row * kTile;
    const uint64_t rest = elements - t.first;
    t.count = t.rows > 1 ? t.rows * elements : (rest < kTile ? rest : kTile);
    t.offset = t.row * elements + t.first;
    return t;
  }
};

// Calls body(tile) for every tile, on torch's threads when there is enough to share.
template <class Body>
void for_each_tile(uint64_t rows, uint64_t elements, const Body& body) {
  const Tiling tiling(rows, elements);
  const int64_t count = int64_t(tiling.count);
  // A parallel region costs some 300 ns even with one thread, as much as 400 elements.
  if (rows * elements <= kSerial || one_thread) {
    for (int64_t i = 0; i < count; ++i) body(tiling[uint64_t(i)]);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) body(tiling[uint64_t(i)]);
}

// Rows of a tile, one after the other: body(row, first element inside the tile, count).
template <class Body>
SK_INLINE void for_each_row(const Tile& tile, const Body& body) {
  const uint64_t count = tile.count / tile.rows;
  for (uint64_t r = 0; r < tile.rows; ++r) body(tile.row + r, r * count, count);
}

}  // namespace
}  // namespace sk

#include "fill.h"

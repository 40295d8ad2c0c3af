// Runs every kernel over sizes, dtypes and alignments on buffers of exactly their size, and
// prints a line with a checksum of what it wrote. For sanitizers and planted defects; no Python in
// it.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "../host/buffers.h"
#include "cuda/kernels.h"

namespace {

using sk::Kind;

const sk::NoiseKey kKey = {0x8000000000000005u, 0xFFFFFFFEu, 9, 3};
const sk::DeviceAndStream kTarget = {0, nullptr};

void report(const char* op, int variant, uint64_t rows, uint64_t elements, uint64_t shift,
            const Buffer& out) {
  printf("%s %d rows %" PRIu64 " elements %" PRIu64 " shift %" PRIu64 " %016" PRIx64 "\n", op,
         variant, rows, elements, shift, out.checksum());
}

void run(uint64_t rows, uint64_t elements, uint64_t shift, bool addressed = false) {
  Buffer at = addresses(rows);
  sk::NoiseKey key = kKey;
  if (addressed) key.addresses = at.at<sk::Address>();
  const uint64_t count = rows * elements;
  Buffer x = floats(count, shift), sigma = floats(rows, 0), weight = floats(rows, 0);
  Buffer partial(4 * rows * sk::cuda::partials(elements), 4, 0);
  for (int kind = 0; kind < 4; ++kind) {
    Buffer out(count, kind == 0 ? 8 : 4, shift);
    sk::cuda::fill({out.at<void>(), rows, elements, Kind(kind), key}, kTarget);
    report("fill", kind, rows, elements, shift, out);
  }
  Buffer noisy(count, 4, shift);
  sk::cuda::perturb({noisy.at<float>(), x.at<float>(), sigma.at<float>(), rows, elements, key},
                    kTarget);
  report("perturb", 0, rows, elements, shift, noisy);
  // No mask, one where the others are, and one a byte further.
  Buffer table = floats(5 * rows, 0),
         masks[] = {{0, 1, 0}, {count, 1, shift}, {count, 1, shift + 1}};
  for (uint64_t i = 0; i < count; ++i)
    masks[1].at<uint8_t>()[i] = masks[2].at<uint8_t>()[i] = i % 3 == 0;
  const int64_t step = 1;
  Buffer gain = squares(count, shift);
  for (int d = 0; d < 3; ++d) {
    const Dtype dtype = Dtype(d);
    Buffer score = scores(count, dtype, shift), other = scores(count, dtype, shift);
    for (const float c : {0.0f, 0.3f}) {
      Buffer out(count, 4, shift);
      sk::cuda::affine_step({out.at<float>(), x.at<float>(), score.at<void>(), dtype, rows,
                             elements, 0.9f, 0.4f, c, key},
                            kTarget);
      report("affine", d, rows, elements, shift, out);
    }
    for (const bool per_row : {false, true})
      for (Buffer& mask : masks) {
        Buffer stepped = floats(count, shift);
        const bool some = &mask != masks;
        const uint64_t columns = some ? 5 : 3;
        sk::cuda::table_step(
            {stepped.at<float>(), stepped.at<float>(), score.at<void>(), dtype, rows, elements,
             table.at<float>(), per_row ? nullptr : &step, rows, columns, per_row,
             some ? x.at<float>() : nullptr, some ? mask.at<uint8_t>() : nullptr,
             some ? gain.at<float>() : nullptr, some ? sk::End::kWrap : sk::End::kClamp, 0.5f, 2.0f,
             key},
            kTarget);
        report("table", d, rows, elements, shift, stepped);
      }
    Buffer loss(rows, 4, 0), gradient(count, d == 0 ? 4 : 2, shift);
    sk::cuda::dsm(
        {loss.at<float>(), gradient.at<float>(), partial.at<float>(), score.at<void>(), dtype,
         sigma.at<float>(), weight.at<float>(), sigma.at<float>(), rows, elements, key},
        kTarget);
    report("loss", d, rows, elements, shift, loss);
    report("gradient", d, rows, elements, shift, gradient);
    for (const Kind kind : {Kind::kNormal, Kind::kRademacher})
      for (const bool differences : {false, true}) {
        Buffer sums(4 * rows, 4, 0);
        sk::cuda::probe(
            {sums.at<float>(), partial.at<float>(), kind, score.at<void>(), other.at<void>(), dtype,
             differences, nullptr, nullptr, rows, elements, key},
            kTarget);
        report("sums", d, rows, elements, shift, sums);
      }
  }
  for (const bool pair : {false, true}) {
    Buffer out((pair ? 2 : 1) * count, 4, shift);
    sk::cuda::probe({out.at<float>(), nullptr, Kind::kNormal, nullptr, nullptr, Dtype::kFloat32,
                     false, sigma.at<float>(), pair ? x.at<float>() : nullptr, rows, elements, key},
                    kTarget);
    report("scale", pair, rows, elements, shift, out);
  }
}

}  // namespace

int main() {
  try {
    for (const uint64_t elements : {1, 3, 4, 5, 64, 132, 255, 1023, 4103, 8704})
      for (const uint64_t shift : {0, 1}) run(elements < 64 ? 37 : 3, elements, shift);
    for (const uint64_t elements : {3, 132, 1023}) run(elements < 64 ? 37 : 3, elements, 0, true);
  } catch (const std::exception& error) {
    printf("failed: %s\n", error.what());
    return 1;
  }
}

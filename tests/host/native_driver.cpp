// Runs every kernel of csrc/cpu in one instruction set over sizes, dtypes and alignments, on
// buffers of exactly their size, and prints a line with a checksum of what it wrote. For sanitizers
// and planted defects; no Python in it. Its argument names the instruction set.
#include <cinttypes>
#include <cstdio>
#include <initializer_list>

#include "buffers.h"
#include "cpu/kernels.h"

namespace {

using sk::Kind;

// The last but one sample whose low word does not carry.
const sk::NoiseKey kKey = {0x8000000000000005u, 0xFFFFFFFEu, 9, 3};

// Every other line has no noise, and every third a known part without noise.
Buffer lines(uint64_t rows, uint64_t columns) {
  Buffer table = floats(columns * rows, 0);
  for (uint64_t row = 0; row < rows; row += 2) table.at<float>()[columns * row + 2] = 0;
  for (uint64_t row = 0; columns == 5 && row < rows; row += 3) table.at<float>()[5 * row + 4] = 0;
  return table;
}

// A score by elements, params[0] of them in a group.
void halve(const float* x, float sigma, float* s, uint64_t groups, const float* params) {
  for (uint64_t i = 0; i < groups * uint64_t(params[0]); ++i) s[i] = 0.5f * x[i] - sigma;
}

void run(const sk::Isa& isa, uint64_t rows, uint64_t elements, uint64_t shift,
         bool addressed = false) {
  Buffer at = addresses(rows);
  sk::NoiseKey key = kKey;
  if (addressed) key.addresses = at.at<sk::Address>();
  const auto report = [=](const char* op, int variant, const Buffer& out) {
    printf("%s %d rows %" PRIu64 " elements %" PRIu64 " shift %" PRIu64 " %016" PRIx64 "\n", op,
           variant, rows, elements, shift, out.checksum());
  };
  const uint64_t count = rows * elements;
  Buffer x = floats(count, shift), sigma = floats(rows, shift), weight = floats(rows, shift);
  for (int kind = 0; kind < 4; ++kind) {
    Buffer out(count, kind == 0 ? 8 : 4, shift);
    isa.fill({out.at<void>(), rows, elements, Kind(kind), key});
    report("fill", kind, out);
  }
  Buffer noisy(count, 4, shift);
  isa.perturb({noisy.at<float>(), x.at<float>(), sigma.at<float>(), rows, elements, key});
  report("perturb", 0, noisy);
  Buffer mask(count, 1, shift);
  for (uint64_t i = 0; i < count; ++i) mask.at<uint8_t>()[i] = i % 3 == 0;
  Buffer gain = squares(count, shift);
  for (int d = 0; d < 3; ++d) {
    const Dtype dtype = Dtype(d);
    Buffer score = scores(count, dtype, shift), other = scores(count, dtype, shift);
    for (const float c : {0.0f, 0.3f}) {
      Buffer out(count, 4, shift), same = floats(count, shift);
      isa.affine_step({out.at<float>(), x.at<float>(), score.at<void>(), dtype, rows, elements,
                       0.9f, 0.4f, c, key});
      report("affine", d, out);
      isa.affine_step({same.at<float>(), same.at<float>(), score.at<void>(), dtype, rows, elements,
                       0.9f, 0.4f, c, key});
      report("affine in place", d, same);
    }
    for (const bool per_row : {false, true})
      for (const bool some : {false, true}) {
        const uint64_t columns = some ? 5 : 3;
        for (const sk::End end : {sk::End::kNone, sk::End::kClamp, sk::End::kWrap}) {
          Buffer stepped = floats(count, shift), table = lines(per_row ? rows : 1, columns);
          sk::TableArgs args = {stepped.at<float>(),
                                stepped.at<float>(),
                                score.at<void>(),
                                dtype,
                                rows,
                                elements,
                                table.at<float>(),
                                nullptr,
                                per_row ? rows : 1,
                                columns,
                                per_row,
                                some ? x.at<float>() : nullptr,
                                some ? mask.at<uint8_t>() : nullptr,
                                end == sk::End::kNone ? nullptr : gain.at<float>(),
                                end,
                                0.5f,
                                2.0f,
                                key};
          isa.table_step(args);
          report("table", 6 * per_row + 3 * some + int(end), stepped);
        }
      }
    for (const bool weighted : {false, true}) {
      Buffer loss(rows, 4, 0), again(rows, 4, 0), gradient(count, 4, shift);
      sk::DsmArgs dsm = {again.at<float>(),
                         nullptr,
                         nullptr,
                         score.at<void>(),
                         dtype,
                         sigma.at<float>(),
                         weighted ? weight.at<float>() : nullptr,
                         nullptr,
                         rows,
                         elements,
                         key};
      isa.dsm(dsm);
      report("loss", d, again);
      dsm.loss = loss.at<float>(), dsm.gradient = gradient.at<float>();
      isa.dsm(dsm);
      report("loss", d, loss);
      report("gradient of the loss", d, gradient);
      dsm.loss = nullptr, dsm.upstream = sigma.at<float>();
      isa.dsm(dsm);
      report("gradient", d, gradient);
    }
    for (const Kind kind : {Kind::kNormal, Kind::kRademacher})
      for (int variant = 0; variant < 3; ++variant) {
        Buffer sums(4 * rows, 4, 0);
        isa.probe({sums.at<float>(), nullptr, kind, score.at<void>(),
                   variant ? other.at<void>() : nullptr, dtype, variant == 2, nullptr, nullptr,
                   rows, elements, key});
        report("sums", variant, sums);
      }
  }
  const int lanes = !strcmp(isa.name, "avx512") ? 16 : !strcmp(isa.name, "avx2") ? 8 : 4;
  Buffer chained = floats(count, shift), table = lines(5, 5);
  const float group = float(elements * lanes);
  isa.chain({chained.at<float>(), reinterpret_cast<void*>(halve), &group, table.at<float>(), rows,
             elements, 5, sk::End::kWrap, 0.5f, 2.0f, key});
  report("chain", 0, chained);
  for (const Kind kind : {Kind::kNormal, Kind::kRademacher})
    for (const bool pair : {false, true}) {
      Buffer out((pair ? 2 : 1) * count, 4, shift);
      isa.probe({out.at<float>(), nullptr, kind, nullptr, nullptr, Dtype::kFloat32, false,
                 sigma.at<float>(), pair ? x.at<float>() : nullptr, rows, elements, key});
      report("scale", pair, out);
    }
}

}  // namespace

int main(int, char** arguments) {
  for (const sk::Isa& isa : sk::kIsas) {
    if (strcmp(isa.name, arguments[1])) continue;
    if (!isa.supported()) return 77;
    for (const uint64_t shift : {0, 1, 3}) {
      for (const uint64_t elements : {1, 2, 3, 4, 5, 16, 17, 31, 64, 100, 132, 255})
        run(isa, 37, elements, shift);
      // Long rows, on several threads, and one element beyond whole tiles.
      for (const uint64_t elements : {1023, 1024, 1025, 3073}) run(isa, 3, elements, shift);
      // So many short rows that they are shared by threads.
      for (const uint64_t elements : {1, 3, 21}) run(isa, 4099 / elements + 2, elements, shift);
    }
    for (const uint64_t elements : {1, 2, 3, 4, 5, 132, 1025}) run(isa, 37, elements, 0, true);
    run(isa, 1500, 3, 0, true);
    return 0;
  }
  return 1;
}

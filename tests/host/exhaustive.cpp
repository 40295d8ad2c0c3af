// Over every one of the 2^32 words: csrc/noise.h's radius and half circle
//   1. give the same bits when each fma is evaluated in fp64 and rounded to fp32, as a machine
//      without fma (and the pure-torch reference) does;
//   2. are close enough to the exact functions for the contract's bound on a normal.
// And the scalar Philox gives Random123's known answers, read from the file named by argv[1].
#include <cinttypes>
#include <cstdio>

#include "../../csrc/noise.h"

namespace {

// fp32 values held in fp64, every operation in fp64 and then rounded to fp32.
struct Wide {
  double v;
  explicit Wide(float x) : v(x) {}
  static Wide rounded(double x) { return Wide(float(x)); }
};
struct Bits {
  uint32_t v;
  explicit Bits(uint32_t x) : v(x) {}
};

Wide fma(Wide a, Wide b, Wide c) { return Wide::rounded(a.v * b.v + c.v); }
Wide operator*(Wide a, Wide b) { return Wide::rounded(a.v * b.v); }
Wide operator-(Wide a, Wide b) { return Wide::rounded(a.v - b.v); }
Wide square_root(Wide a) { return Wide::rounded(std::sqrt(a.v)); }
Bits operator+(Bits a, Bits b) { return Bits(a.v + b.v); }
Bits operator-(Bits a, Bits b) { return Bits(a.v - b.v); }
Bits operator&(Bits a, Bits b) { return Bits(a.v & b.v); }
Wide from_unsigned(Bits w) { return Wide::rounded(double(w.v)); }
Wide from_signed(Bits w) { return Wide::rounded(double(int32_t(w.v))); }
Wide from_bits(Bits w) { return Wide(sk::from_bits(w.v)); }
Bits to_bits(Wide x) { return Bits(sk::to_bits(float(x.v))); }

void at_most(double& worst, double error) {
  if (error > worst) worst = error;
}

int known_answers(const char* path) {
  FILE* file = fopen(path, "r");
  if (!file) return 1;
  char line[256];
  int rows = 0, wrong = 0;
  while (fgets(line, sizeof line, file)) {
    uint32_t c[4], k[2], w[4];
    if (sscanf(line,
               "%" SCNx32 "%" SCNx32 "%" SCNx32 "%" SCNx32 "%" SCNx32 "%" SCNx32 "%" SCNx32
               "%" SCNx32 "%" SCNx32 "%" SCNx32,
               c, c + 1, c + 2, c + 3, k, k + 1, w, w + 1, w + 2, w + 3) != 10)
      continue;
    const sk::Words got = sk::philox4x32_10({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
    wrong += memcmp(got.w, w, sizeof w) != 0;
    ++rows;
  }
  fclose(file);
  printf("known answers: %d rows, %d wrong\n", rows, wrong);
  return rows != 3 || wrong;
}

}  // namespace

int main(int, char** argv) {
  uint64_t radius_differs = 0, circle_differs = 0, radii = 0, angles = 0;
  double radius_error = 0, cosine_error = 0, sine_error = 0;

  // Many words round to one float: each float is looked at once.
  float last = -1.0f;
  for (uint64_t i = 0; i < uint64_t{1} << 32; ++i) {
    const uint32_t w = uint32_t(i);
    if (float(w) == last) continue;
    last = float(w);
    ++radii;
    const float r = sk::radius<float>(w);
    radius_differs += r != float(sk::radius<Wide>(Bits(w)).v);
    at_most(radius_error, std::fabs(r - std::sqrt(-2 * std::log(double(sk::uniform<float>(w))))));
  }

  // The low 31 bits as a signed fraction, from 0 up and then from -1 up.
  last = -1.0f;
  for (uint64_t i = 0; i < uint64_t{1} << 31; ++i) {
    const uint32_t w = uint32_t(i);
    const float g = float(int32_t(w << 1));
    if (g == last) continue;
    last = g;
    ++angles;
    float cosine, sine;
    Wide wide_cosine(0.0f), wide_sine(0.0f);
    sk::half_circle(w, cosine, sine);
    sk::half_circle(Bits(w), wide_cosine, wide_sine);
    circle_differs += cosine != float(wide_cosine.v) || sine != float(wide_sine.v);
    const double angle = double(int32_t(w << 1)) * 0x1p-31 * 1.5707963267948966;
    at_most(cosine_error, std::fabs(cosine - std::cos(angle)));
    at_most(sine_error, std::fabs(sine - std::sin(angle)));
  }

  // |z - exact| <= r |cos error| + |radius error| |cos| + half an ulp of r; where cos or sin is
  // far off it is not near 1, and 1.9e-7 of the largest radius leaves room for the other two.
  printf("radius: %" PRIu64 " values, %" PRIu64 " differ in fp64, error %.3g\n", radii,
         radius_differs, radius_error);
  printf("half circle: %" PRIu64 " values, %" PRIu64 " differ in fp64, errors %.3g %.3g\n", angles,
         circle_differs, cosine_error, sine_error);
  const int wrong = known_answers(argv[1]);
  return wrong || radius_differs || circle_differs || radius_error > 5.6e-7 ||
         cosine_error > 1.9e-7 || sine_error > 1.9e-7;
}

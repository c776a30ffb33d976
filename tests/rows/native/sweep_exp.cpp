// The worst errors of the exponential in exp.h, in float over every argument and in double over a fine grid, by
// instruction set SX_ISA. Prints name and error, one a line; tests/rows/native/test_exp.py compares them with exp.h's words.
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#include "exp.h"

using namespace softmax_ext::SX_ISA;

namespace {

constexpr double reduced = 0.34662;  // ln 2 / 2 and what the reduction's rounding adds

// |polynomial / exp - 1| in exact arithmetic: the coefficients alone.
template <class F, class Real> Real polynomial(Real r) {
  constexpr int n = sizeof(Exp<F>::c) / sizeof(F);
  Real q = Exp<F>::c[n - 1];
  for (int i = n - 2; i >= 0; --i) q = q * r + (Real)Exp<F>::c[i];
  return std::fabs((1 + r + r * r * q) / std::exp(r) - 1);
}

float next(float x, uint32_t steps) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  u += steps;
  std::memcpy(&x, &u, 4);
  return x;
}

// The worst of f over every float of [from, to], both of one sign, W at a time; the cores share the range.
template <class Each> double worst(float from, float to, Each f) {
  uint32_t a, b;
  std::memcpy(&a, &from, 4), std::memcpy(&b, &to, 4);
  const unsigned parts = 16;
  std::vector<double> found(parts);
  auto part = [&](unsigned p) {
    uint64_t begin = a + (uint64_t)(b - a + 1) * p / parts, end = a + (uint64_t)(b - a + 1) * (p + 1) / parts;
    for (uint64_t u = begin; u < end; u += W<float>) {
      float x[W<float>];
      for (int l = 0; l < W<float>; ++l) x[l] = next(from, (uint32_t)((u + (unsigned)l < end ? u + (unsigned)l : end - 1) - a));
      double e = f(x);
      if (!(e <= found[p])) found[p] = e;  // NaN counts as the worst
    }
  };
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < 2; ++t)
    pool.emplace_back([&, t] {
      for (unsigned p = t; p < parts; p += 2) part(p);
    });
  for (auto& t : pool) t.join();
  double most = 0;
  for (double e : found) most = e <= most ? most : e;
  return most;
}

// exp(x - m) as the kernels take it, in ulp of the result; below the smallest normal number nothing is asked.
double shifted(const float* x, float m) {
  float e[W<float>];
  store(e, exp_shifted<float>(load(x), Shift<float>(all<float>(m))).e);
  double most = 0;
  for (int l = 0; l < W<float>; ++l) {
    double truth = std::exp((double)x[l] - (double)m);
    int exponent;
    std::frexp(truth, &exponent);
    double error = std::fabs(e[l] - truth) / std::ldexp(1.0, exponent - 24);
    if (truth >= 0x1p-126 && !(error <= most)) most = error;
  }
  return most;
}

}  // namespace

int main() {
  double p = 0;
  for (float sign : {-1.0f, 1.0f})  // below 2^-14 the terms of the polynomial are under half an ulp
    p = std::fmax(p, worst(sign * 0x1p-14f, sign * (float)reduced, [](const float* r) {
                    double most = 0;
                    for (int l = 0; l < W<float>; ++l) most = std::fmax(most, polynomial<float, double>(r[l]));
                    return most;
                  }));
  std::printf("polynomial float %a\n", p);
  long double q = 0;
  for (int i = -(1 << 20); i <= 1 << 20; ++i) q = std::fmax(q, polynomial<double, long double>(reduced * i / (1 << 20)));
  std::printf("polynomial double %a\n", (double)q);
  // every float from -88 to -2^-24 below a maximum of 0; then, where the shift itself needs two parts, around others
  std::printf("shifted by 0 %a\n", worst(-0x1p-24f, -88.0f, [](const float* x) { return shifted(x, 0); }));
  double others = 0;
  for (float m : {0.7f, 3.14159f, 40.3f, 87.77f, 255.9f, 256.1f, 1000.3f, 30000.7f, 1e6f})
    if (m > 88) others = std::fmax(others, worst(m - 87, m, [m](const float* x) { return shifted(x, m); }));
    else others = std::fmax(others, worst(m / 2, m, [m](const float* x) { return shifted(x, m); }));
  std::printf("shifted by others %a\n", others);
}

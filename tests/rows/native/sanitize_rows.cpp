// Every row function at every V from 0 to two vectors plus one (and the block edges), every type and layout, on buffers
// off alignment by each of five elements, for the instruction set named by the argument (0 baseline, 1 AVX2, 2 AVX-512).
// Built with the address and undefined-behaviour sanitisers, which do the judging; what softmax writes is also checked.
#include "far_classes.h"

namespace {

int64_t calls = 0;

void check_softmax(const SoftmaxFwd& a) {
  const Layout& y = a.layout;
  if (a.type != Type::f32) return;
  const float *x = (const float*)a.x, *p = (const float*)a.y;
  for (int64_t r = 0; r < y.rows(); ++r) {
    int64_t at = r / y.inner * y.V * y.inner + r % y.inner;
    double top = -INFINITY, sum = 0;
    for (int64_t v = 0; v < y.V; ++v) top = std::fmax(top, x[at + v * y.inner]);
    for (int64_t v = 0; v < y.V; ++v) sum += std::exp(x[at + v * y.inner] - top);
    for (int64_t v = 0; v < y.V; ++v) {
      double truth = std::exp(x[at + v * y.inner] - top) / sum, ours = p[at + v * y.inner];
      if (std::fabs(ours - truth) <= 1e-6 * truth || (std::isnan(ours) && std::isnan(truth))) continue;
      std::fprintf(stderr, "softmax is %g, truth %g: V %lld, inner %lld\n", ours, truth, (long long)y.V, (long long)y.inner);
      std::abort();
    }
  }
}

void one(Layout y, Type type, int64_t shift) {
  drive(y, type, shift, [&](Fn fn, const void* args, const std::vector<Buffer*>&) {
    ++calls;
    if (!run(fn, args, 0, plan(y).units)) std::abort();
    if (fn == Fn::softmax_fwd) check_softmax(*(const SoftmaxFwd*)args);
  });
}

void check_points(const Points& a) {
  const int64_t V = a.layout.V;
  for (int64_t i = 0; i < a.layout.outer * a.K; ++i)
    if (a.ids[i] < -1 || a.ids[i] >= V) std::abort();
}

void classes(int64_t N, int64_t D, int64_t V, int64_t K, Type type, int64_t shift) {
  drive_classes(N, D, V, K, type, shift, [&](Fn fn, const void* args, int64_t units, const std::vector<Buffer*>&) {
    ++calls;
    if (!run(fn, args, 0, units)) std::abort();
    if (fn == Fn::points) check_points(*(const Points*)args);
  });
}

}  // namespace

int main(int argc, char** argv) {
  int level = argc > 1 ? std::atoi(argv[1]) : -1;
  if (limit_instruction_set(level) != level && level >= 0) {
    std::printf("this CPU lacks instruction set %d: nothing was run\n", level);
    return 77;
  }
  for (Type t : {Type::f32, Type::f64, Type::bf16, Type::f16}) {
    for (int64_t V = 0; V <= 33; ++V) {
      for (int64_t shift = 0; shift < 5; ++shift) one({5, V, 1}, t, shift);
      for (int64_t inner : {1, 2, 7, 15, 16, 17, 33})
        for (int64_t outer : {0, 1, 17}) one({outer, V, inner}, t, (V + inner + outer) % 5);
    }
    for (int64_t V = 127; V <= 161; ++V)  // from the shortest row that is walked along itself, two vectors and one
      for (int64_t shift = 0; shift < 5; ++shift) one({2, V, 1}, t, shift);
    for (int64_t V = 127; V <= 130; ++V)  // a few long rows interleaved
      for (int64_t inner : {2, 3, 15}) one({3, V, inner}, t, V % 5);
    for (int64_t V : {255, 256, 257}) one({3, V, 1}, t, 3);
    for (int64_t V : {4095, 4096, 4097, 8191, 8193, 8200}) one({2, V, 1}, t, 1), one({1, V, 3}, t, 1);
    for (int64_t D = 0; D <= 33; ++D)
      for (int64_t K : {0, 1, 4}) classes(3, D, 5, K, t, (D + K) % 5);
    for (int64_t D : {63, 64, 65, 129}) classes(5, D, 40, 9, t, 1);
    for (int64_t V : {0, 1, 2, 127, 128, 129, 255, 257, 300}) classes(4, 3, V, 6, t, V % 5);
    classes(0, 5, 4, 3, t, 0), classes(300, 2, 2, 7, t, 1);
    for (Layout y : {Layout{1, 9, 130}, Layout{70, 3, 1}, Layout{129, 1, 1}, Layout{1, 32769, 1}}) one(y, t, 1);
  }
  if (!far_classes()) std::printf("no address space for 2^32 pairs: they were not tried\n");
  std::printf("%lld calls, instruction set %s\n", (long long)calls, instruction_set_name());
}

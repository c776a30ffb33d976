// Chooses the kernels for this CPU once and cuts calls into units.
#include "dispatch.h"

#include <atomic>
#include <utility>

namespace softmax_ext {
namespace {

int best() {
#if defined(SX_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return 2;
  // every CPU with AVX2 and FMA also has F16C; the name is missing from older compilers' lists
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 1;
#endif
  return 0;
}

std::atomic<int> level{best()};

}  // namespace

int instruction_set() { return level.load(std::memory_order_relaxed); }

int limit_instruction_set(int wanted) {
  int top = best();
  level.store(wanted < 0 ? top : wanted < top ? wanted : top, std::memory_order_relaxed);
  return instruction_set();
}

const char* instruction_set_name() {
  switch (instruction_set()) {
    case 2: return "AVX-512";
    case 1: return "AVX2";
  }
#if defined(__aarch64__)
  return "NEON";
#else
  return "baseline";
#endif
}

Plan plan(const Layout& y) {
  constexpr int64_t worth = 32768;  // elements that take a few microseconds, about what waking a thread costs
  int64_t units, elements;
  switch (way_of(y)) {
    case Way::wide: units = y.rows(), elements = y.V; break;
    case Way::planes: units = y.outer, elements = y.V * y.inner; break;
    case Way::strips: units = y.outer * strip_units(y), elements = y.V * unit_lanes; break;
    default: units = (y.rows() + unit_lanes - 1) / unit_lanes, elements = y.V * unit_lanes;
  }
  int64_t grain = elements < worth ? worth / (elements > 0 ? elements : 1) : 1;
  return {units, grain > 0 ? grain : 1};
}

static Plan by_rows(int64_t rows, int64_t elements) {
  int64_t grain = 32768 / (elements > 0 ? elements : 1);
  return {rows, grain > 0 ? grain : 1};
}
Plan plan(const Points& a) { return by_rows(a.layout.outer, a.layout.V); }
Plan plan(const Picked& a) {
  if (a.pairs) return {Pairs::units, 1};
  return by_rows(a.layout.outer, a.K * a.layout.V);
}

Plan plan(const Divergence& a) { return by_rows(a.layout.rows(), 4 * a.layout.V); }

void prepare(CrossEntropy& a) {
  if (!a.weight) {
    a.weight_sum = (double)a.layout.V;
    return;
  }
  auto at = [&](int64_t v) {
    return a.type == Type::f64 ? ((const double*)a.weight)[v] : (double)((const float*)a.weight)[v];
  };
  double s = 0, lost = 0, top = a.layout.V > 0 ? at(0) : 0;
  int64_t heavy = 0;
  for (int64_t v = 1; v < a.layout.V; ++v) {
    double w = at(v);
    if (w > top) std::swap(w, top), heavy = v;
    double t = s + w, b = t - s;
    lost += (s - (t - b)) + (w - b);
    s = t;
  }
  a.weight_aside = s + lost;
  a.weight_sum = a.weight_aside + top;
  a.heavy = 2 * top > a.weight_sum ? heavy : -1;
}

bool run(Fn fn, const void* args, int64_t begin, int64_t end) {
  // every argument structure begins with the layout and the type
  struct Head { Layout layout; Type type; };
  Type type = static_cast<const Head*>(args)->type;
#if defined(SX_X86)
  switch (instruction_set()) {
    case 2: return avx512::run(fn, type, args, begin, end);
    case 1: return avx2::run(fn, type, args, begin, end);
  }
#endif
  return base::run(fn, type, args, begin, end);
}

}  // namespace softmax_ext

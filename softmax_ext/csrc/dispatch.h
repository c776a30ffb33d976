// How an array is walked, and which build of the kernels serves. Shared by every build of kernels.cpp.
#pragma once
#include "rows.h"

namespace softmax_ext {

enum class Way { wide, short_rows, strips, planes };

constexpr int64_t wide_from = 128;  // shorter rows go side by side: the horizontal sums cost more than a transpose
constexpr int64_t unit_lanes = 64;  // rows per unit where rows go side by side: a multiple of every vector width
static constexpr int64_t min_strip = 16;

static inline Way way_of(const Layout& y) {
  if (y.inner >= min_strip && y.V <= INT32_MAX) return Way::strips;  // lanes count classes in their own width
  if (y.V < wide_from) return Way::short_rows;
  return y.inner == 1 ? Way::wide : Way::planes;
}
static inline int64_t strip_units(const Layout& y) { return (y.inner + unit_lanes - 1) / unit_lanes; }

namespace avx512 { bool run(Fn, Type, const void*, int64_t, int64_t); }
namespace avx2 { bool run(Fn, Type, const void*, int64_t, int64_t); }
namespace base { bool run(Fn, Type, const void*, int64_t, int64_t); }

}  // namespace softmax_ext

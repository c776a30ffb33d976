// Visits of one contiguous row, vectorised along it.
//
// Block by block: the maximum of a block, then its exponentials, while the block is in L1 and the next one is
// being prefetched. One read of memory, whatever the length of the row, and no exp per element for a running maximum.
#pragma once
#include "accumulate.h"
#include "row_state.h"
#include "transform.h"

namespace softmax_ext::SX_ISA {

constexpr int64_t block_elements = 4096;  // 16 KiB of float: half of the smallest L1 in use

template <class T> Compute<T> max_of(const T* x, int64_t n) {  // of the numbers: NaN is skipped
  using F = Compute<T>;
  const F low = -__builtin_inff();
  Vec<F> a = all<F>(low), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W<F> <= n; i += 4 * W<F>) {
    a = max(load(x + i), a);
    b = max(load(x + i + W<F>), b);
    c = max(load(x + i + 2 * W<F>), c);
    d = max(load(x + i + 3 * W<F>), d);
  }
  for (; i + W<F> <= n; i += W<F>) a = max(load(x + i), a);
  if (i < n) a = max(load_part(x + i, n - i, low), a);
  return lane_max<F>(max(max(a, b), max(c, d)));
}

// One bit a lane.
template <class F> SX_INLINE uint64_t bits_of(Ints<F> x) {
#if SX_AVX512
  if constexpr (sizeof(F) == 4) return _mm512_movepi32_mask((__m512i)x);
  else return _mm512_movepi64_mask((__m512i)x);
#elif SX_AVX2
  if constexpr (sizeof(F) == 4) return _mm256_movemask_ps((__m256)x);
  else return _mm256_movemask_pd((__m256d)x);
#elif defined(__SSE2__)
  if constexpr (sizeof(F) == 4) return _mm_movemask_ps((__m128)x);
  else return _mm_movemask_pd((__m128d)x);
#else
  typename Of<F>::Int lane[W<F>];
  std::memcpy(lane, &x, sizeof lane);
  uint64_t bits = 0;
  for (int l = 0; l < W<F>; ++l) bits |= (uint64_t)(lane[l] & 1) << l;
  return bits;
#endif
}
// Where the first x >= least is, or -1. `beside`, of x's type and length, is wanted next: memory sends both at once.
template <class T> int64_t first_from(const T* x, int64_t n, Compute<T> least, const T* beside) {
  using F = Compute<T>;
  const Vec<F> value = all<F>(least);
  int64_t i = 0;
  for (; i + 8 * W<F> <= n; i += 8 * W<F>) {
    Vec<F> a[8];
    for (int k = 0; k < 8; ++k) a[k] = load(x + i + k * W<F>);
    for (size_t b = 0; b < 8 * W<F> * sizeof(T); b += 64) __builtin_prefetch((const char*)(beside + i) + b);
    for (int k = 4; k > 0; k /= 2)
      for (int j = 0; j < k; ++j) a[j] = max(a[j], a[j + k]);
    if (bits_of<F>(a[0] >= value)) break;
  }
  for (; i < n; i += W<F>) {
    uint64_t hit = bits_of<F>(load_n(x + i, n - i < W<F> ? n - i : W<F>, -__builtin_inff()) >= value);
    if (hit) return i + __builtin_ctzll(hit);
  }
  return -1;
}

// Adds exp(z_j - shift) over [0, n) to `sum`. Top: leaves out every x_j == top and returns how many there were.
// `ahead`: what to prefetch meanwhile, or null. Keep: also leaves every exp in `kept`, which may be x itself.
template <class T, bool Tr, bool Top, bool Near, bool Keep = false>
int64_t sum_exp(const T* x, int64_t n, Compute<T> top, const Shift<Compute<T>>& s, const Transform<Compute<T>>& tr,
                Sum<Compute<T>>& sum, const T* ahead, [[maybe_unused]] Compute<T>* kept = nullptr) {
  using F = Compute<T>;
  Ints<F> ties = {};
  auto e = [&](Vec<F> v, int64_t at, int64_t count) SX_LAMBDA {
    Vec<F> r = exp_shifted<F, Near>(Tr ? tr(v) : v, s).e;
    if constexpr (Keep) store_n(kept + at, count, r);
    if (Top) {
      Ints<F> is_top = v == all<F>(top);
      ties += is_top;
      r = is_top ? Vec<F>{} : r;
    }
    return r;
  };
  add_all(sum, n, [&](int64_t i, int64_t count) SX_LAMBDA {
    // a line a vector of float: the compiler drops the test where there is nothing ahead
    if (ahead) __builtin_prefetch(ahead + i);
    return e(load_n(x + i, count, F(-__builtin_inff())), i, count);
  });
  if (!Top) return 0;
  typename Of<F>::Int count[W<F>], total = 0;
  std::memcpy(count, &ties, sizeof count);
  for (auto c : count) total -= c;
  return total;
}

struct NoExtras {
  template <class F> SX_INLINE void operator()(int64_t, int64_t, F, RowState&) const {}
};

// `extras(begin, n, shift, state)` adds what else is wanted of elements [begin, begin + n).
template <class T, bool Tr, class Extras = NoExtras>
SX_INLINE RowState visit_row(const T* x, int64_t V, const Transform<Compute<T>>& tr, const Extras& extras = {}) {
  using F = Compute<T>;
  RowState st;
  for (int64_t b = 0; b < V; b += block_elements) {
    int64_t n = V - b < block_elements ? V - b : block_elements;
    // a whole block ahead, never past the row: the tail of the row is left to the hardware
    const T* ahead = V - b >= 2 * block_elements ? x + b + block_elements : nullptr;
    F top = max_of(x + b, n);
    F z = Tr ? tr.one(top) : top;
    bool raised = z > st.m;
    if (raised) st.raise(z);
    if (st.m == inf) break;
    Shift<F> s(all<F>((F)st.shift()));
    Sum<F> sum;
    bool near = is_near((F)st.shift());
    auto add = raised ? (near ? sum_exp<T, Tr, true, true> : sum_exp<T, Tr, true, false>)
                      : (near ? sum_exp<T, Tr, false, true> : sum_exp<T, Tr, false, false>);
    int64_t tops = add(x + b, n, top, s, tr, sum, ahead, nullptr);
    if (raised) st.rest += (double)(tops - 1);
    st.rest += sum.total();
    extras(b, n, (F)st.shift(), st);
  }
  st.close();
  return st;
}

// For a row that fits the second-level cache beside its result: the maximum of all of it first, then every exp once,
// left in `kept` for the caller to scale (kept may be x). A second exp costs more than the trip to L2 and back: softmax
// of (4096, 1000) takes 11.8 ns per 16 elements with it, 9.6 without, a copy 4.6 (one core, AVX-512).
constexpr int64_t keep_up_to = 32768;

template <class T> SX_INLINE RowState visit_row_keeping(const T* x, Compute<T>* kept, int64_t V) {
  using F = Compute<T>;
  RowState st;
  F top = max_of(x, V);
  st.m = top;
  if (top - top == 0) {
    Shift<F> s(all<F>(top));
    Sum<F> sum;
    auto add = is_near(top) ? sum_exp<T, false, true, true, true> : sum_exp<T, false, true, false, true>;
    int64_t tops = add(x, V, top, s, Transform<F>(1, 0), sum, nullptr, kept);
    st.rest = sum.total() + (double)(tops - 1);
  }
  st.close();
  return st;
}

}  // namespace softmax_ext::SX_ISA

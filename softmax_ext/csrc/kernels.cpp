// The kernels for one instruction set: built once per set, with SX_ISA naming the namespace.
#include "cross_entropy_classes.h"
#include "cross_entropy_lanes.h"
#include "cross_entropy_wide.h"
#include "dispatch.h"
#include "divergence.h"
#include "log_softmax.h"
#include "picked.h"
#include "planes.h"
#include "points.h"
#include "scratch.h"
#include "softmax.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace softmax_ext::SX_ISA {

// Subnormal numbers are 0, in and out, whatever the host's thread does (XLA's flush, torch's do not): results must
// not depend on the caller, and the subnormal way is the slow one (exp.h).
struct FlushSubnormals {
#if defined(__SSE2__)
  unsigned saved = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(0x9fc0); }
  ~FlushSubnormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{1} << 24));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};

template <class T> using In = Strip<const T>;

// Walks units [begin, end): wide rows call row(r), strips direct(offset, r0, W), everything else gathered(r0, n).
template <class T, class Row, class Direct, class Gathered>
void walk(const Layout& y, int64_t begin, int64_t end, Row row, Direct direct, Gathered gathered) {
  constexpr int64_t w = W<Compute<T>>;
  switch (way_of(y)) {
    case Way::wide:
      for (int64_t r = begin; r < end; ++r) row(r);
      return;
    case Way::short_rows:
      for (int64_t u = begin; u < end; ++u) {
        int64_t r0 = u * unit_lanes, stop = r0 + unit_lanes < y.rows() ? r0 + unit_lanes : y.rows();
        for (; r0 < stop; r0 += w) gathered(r0, stop - r0 < w ? stop - r0 : w);
      }
      return;
    case Way::strips: {
      int64_t tiles = strip_units(y);
      for (int64_t u = begin; u < end; ++u) {
        int64_t o = u / tiles, i = u % tiles * unit_lanes, stop = i + unit_lanes < y.inner ? i + unit_lanes : y.inner;
        for (; i + w <= stop; i += w) direct(o * y.V * y.inner + i, o * y.inner + i);
        if (i < stop) gathered(o * y.inner + i, stop - i);
      }
      return;
    }
    case Way::planes: return;  // never: run_as() has made contiguous rows of them
  }
}

inline bool needs_scratch(const Layout& y, int64_t w) {
  return way_of(y) == Way::short_rows || (way_of(y) == Way::strips && y.inner % w != 0);
}

template <class T> bool softmax_fwd(const SoftmaxFwd& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const Layout& y = a.layout;
  const T* x = (const T*)a.x;
  T* out = (T*)a.y;
  const int64_t room = (y.V + W<F> - 1) / W<F> * W<F>;
  // The result can hold the exps of its row, unless they would be rounded there.
  constexpr bool rounds = !std::is_same_v<T, F>;
  const bool keeps = way_of(y) == Way::wide && y.V <= keep_up_to;
  Scratch s(needs_scratch(y, W<F>) ? room * SX_BYTES : keeps && rounds ? y.V * (int64_t)sizeof(F) : 0);
  if (!s.p) return false;
  F* f = (F*)s.p;
  walk<T>(
      y, begin, end,
      [&](int64_t r) {
        T* to = out + r * y.V;
        softmax_fwd_row(x + r * y.V, to, keeps ? (rounds ? f : (F*)to) : nullptr, y.V);
      },
      [&](int64_t at, int64_t) { softmax_fwd_lanes<F, sizeof(T) == sizeof(F)>(In<T>{x + at, y.inner}, Strip<T>{out + at, y.inner}, y.V); },
      [&](int64_t r0, int64_t n) {
        gather(x, y, r0, n, f);
        softmax_fwd_lanes<F, true>(In<F>{f, W<F>}, Strip<F>{f, W<F>}, y.V);
        scatter(f, y, r0, n, out);
      });
  return true;
}

template <class T> bool softmax_bwd(const SoftmaxBwd& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const Layout& y = a.layout;
  constexpr bool halves = !std::is_same_v<T, F>;
  const T *dy = (const T*)a.dy, *p = (const T*)a.y;
  T* out = (T*)a.dx;
  const int64_t room = (y.V + W<F> - 1) / W<F> * W<F>;
  Scratch s(needs_scratch(y, W<F>) ? 2 * room * SX_BYTES : 0);
  if (!s.p) return false;
  F *f = (F*)s.p, *g = f + room * W<F>;
  bool expects = false;
  walk<T>(
      y, begin, end,
      [&](int64_t r) { softmax_bwd_row(dy + r * y.V, p + r * y.V, out + r * y.V, y.V, expects); },
      [&](int64_t at, int64_t) {
        softmax_bwd_lanes<F, halves>(In<T>{dy + at, y.inner}, In<T>{p + at, y.inner}, Strip<T>{out + at, y.inner}, y.V);
      },
      [&](int64_t r0, int64_t n) {
        gather(dy, y, r0, n, f);
        gather(p, y, r0, n, g);
        softmax_bwd_lanes<F, halves>(In<F>{f, W<F>}, In<F>{g, W<F>}, Strip<F>{f, W<F>}, y.V);
        scatter(f, y, r0, n, out);
      });
  return true;
}

template <class T> bool log_softmax_fwd(const LogSoftmaxFwd& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const Layout& y = a.layout;
  const T* x = (const T*)a.x;
  T* out = (T*)a.y;
  const int64_t room = (y.V + W<F> - 1) / W<F> * W<F>;
  Scratch s(needs_scratch(y, W<F>) ? room * SX_BYTES : 0);
  if (!s.p) return false;
  F* f = (F*)s.p;
  walk<T>(
      y, begin, end,
      [&](int64_t r) { log_softmax_fwd_row(x + r * y.V, out + r * y.V, (F*)a.m + r, (F*)a.rest + r, y.V); },
      [&](int64_t at, int64_t r0) {
        log_softmax_fwd_lanes<F>(In<T>{x + at, y.inner}, Strip<T>{out + at, y.inner}, a.m, a.rest, r0, W<F>, y.V);
      },
      [&](int64_t r0, int64_t n) {
        gather(x, y, r0, n, f);
        log_softmax_fwd_lanes<F>(In<F>{f, W<F>}, Strip<F>{f, W<F>}, a.m, a.rest, r0, n, y.V);
        scatter(f, y, r0, n, out);
      });
  return true;
}

template <class T> bool log_softmax_bwd(const LogSoftmaxBwd& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const Layout& y = a.layout;
  const T *dy = (const T*)a.dy, *x = (const T*)a.x;
  const F *m = (const F*)a.m, *rest = (const F*)a.rest;
  T* out = (T*)a.dx;
  const int64_t room = (y.V + W<F> - 1) / W<F> * W<F>;
  Scratch s(needs_scratch(y, W<F>) ? 2 * room * SX_BYTES : 0);
  if (!s.p) return false;
  F *f = (F*)s.p, *g = f + room * W<F>;
  walk<T>(
      y, begin, end,
      [&](int64_t r) {
        log_softmax_bwd_row(dy + r * y.V, x + r * y.V, (double)m[r], (double)rest[r], out + r * y.V, y.V);
      },
      [&](int64_t at, int64_t r0) {
        log_softmax_bwd_lanes<F>(In<T>{dy + at, y.inner}, In<T>{x + at, y.inner}, m, rest,
                                 Strip<T>{out + at, y.inner}, r0, W<F>, y.V);
      },
      [&](int64_t r0, int64_t n) {
        gather(dy, y, r0, n, f);
        gather(x, y, r0, n, g);
        log_softmax_bwd_lanes<F>(In<F>{f, W<F>}, In<F>{g, W<F>}, m, rest, Strip<F>{f, W<F>}, r0, n, y.V);
        scatter(f, y, r0, n, out);
      });
  return true;
}

template <class T, class Y, Do what> bool cross_entropy_as(const CrossEntropy& a, int64_t begin, int64_t end) {
  using F = Compute<T>;
  const Layout& y = a.layout;
  if (way_of(y) == Way::wide) {
    if constexpr (what == Do::both && !std::is_same_v<T, F>)
      if (y.V <= keep_up_to) {
        Scratch kept(y.V * (int64_t)sizeof(F));
        if (kept.p) ce_rows<T, Y, what>(a, begin, end, (F*)kept.p);
        return kept.p;
      }
    ce_rows<T, Y, what>(a, begin, end, nullptr);
    return true;
  }
  const T* x = (const T*)a.logits;
  const Y* dense = is_dense(a) ? (const Y*)a.target : nullptr;
  T* out = (T*)a.dlogits;
  constexpr bool fwd = what != Do::bwd, bwd = what != Do::fwd;
  const int64_t room = (y.V + W<F> - 1) / W<F> * W<F>;
  Scratch s(needs_scratch(y, W<F>) ? (dense ? 2 : 1) * room * SX_BYTES : 0);
  if (!s.p) return false;
  F *f = (F*)s.p, *g = dense ? f + room * W<F> : f;
  walk<T>(
      y, begin, end, [](int64_t) {},
      [&](int64_t at, int64_t r0) {
        ce_lanes<F>(a, fwd, bwd, In<T>{x + at, y.inner}, In<Y>{dense ? dense + at : nullptr, y.inner},
                    Strip<T>{bwd ? out + at : nullptr, y.inner}, r0, W<F>);
      },
      [&](int64_t r0, int64_t n) {
        gather(x, y, r0, n, f);
        if (dense) gather(dense, y, r0, n, g);
        ce_lanes<F>(a, fwd, bwd, In<F>{f, W<F>}, In<F>{g, W<F>}, Strip<F>{f, W<F>}, r0, n);
        if (bwd) scatter(f, y, r0, n, out);
      });
  return true;
}

template <class T, Do what> bool cross_entropy(const CrossEntropy& a, int64_t begin, int64_t end) {
  if (a.target_kind == Target::dense_compute_type) return cross_entropy_as<T, Compute<T>, what>(a, begin, end);
  return cross_entropy_as<T, T, what>(a, begin, end);
}

// A plane at a time, or the rows as they lie.
template <class T, class Args, class Rows> bool run_rows(const void* p, int64_t b, int64_t e, Rows rows) {
  const Args& args = *(const Args*)p;
  return way_of(args.layout) == Way::planes ? each_plane<T>(args, b, e) : rows(args, b, e);
}
template <class T, Do what> bool run_loss(Fn fn, const void* p, int64_t b, int64_t e) {
  const CrossEntropy& args = *(const CrossEntropy*)p;
  if (args.ids)
    return classes_of_rows<T, what>(fn, args, b, e, [](Fn f, const CrossEntropy& one, int64_t from, int64_t to) {
      return run_as<T>(f, &one, from, to);
    });
  return way_of(args.layout) == Way::planes ? each_plane<T>(args, b, e, fn) : cross_entropy<T, what>(args, b, e);
}

template <class T> bool run_as(Fn fn, const void* p, int64_t b, int64_t e) {
  switch (fn) {
    case Fn::softmax_fwd: return run_rows<T, SoftmaxFwd>(p, b, e, softmax_fwd<T>);
    case Fn::softmax_bwd: return run_rows<T, SoftmaxBwd>(p, b, e, softmax_bwd<T>);
    case Fn::log_softmax_fwd: return run_rows<T, LogSoftmaxFwd>(p, b, e, log_softmax_fwd<T>);
    case Fn::log_softmax_bwd: return run_rows<T, LogSoftmaxBwd>(p, b, e, log_softmax_bwd<T>);
    case Fn::cross_entropy_fwd: return run_loss<T, Do::fwd>(fn, p, b, e);
    case Fn::cross_entropy_bwd: return run_loss<T, Do::bwd>(fn, p, b, e);
    case Fn::cross_entropy_fwd_bwd: return run_loss<T, Do::both>(fn, p, b, e);
    case Fn::divergence_fwd: return divergence<T, Do::fwd>(*(const Divergence*)p, b, e);
    case Fn::divergence_bwd: return divergence<T, Do::bwd>(*(const Divergence*)p, b, e);
    case Fn::divergence_fwd_bwd: return divergence<T, Do::both>(*(const Divergence*)p, b, e);
    case Fn::points: return points<T>(*(const Points*)p, b, e);
    case Fn::picked_fwd: return picked_fwd<T>(*(const Picked*)p, b, e);
    case Fn::picked_input_bwd: return picked_input_bwd<T>(*(const Picked*)p, b, e);
    case Fn::picked_weight_bwd: return picked_weight_bwd<T>(*(const Picked*)p, b, e);
  }
  return false;
}

bool run(Fn fn, Type type, const void* args, int64_t begin, int64_t end) {
  FlushSubnormals guard;
  switch (type) {
    case Type::f32: return run_as<float>(fn, args, begin, end);
    case Type::f64: return run_as<double>(fn, args, begin, end);
    case Type::bf16: return run_as<bf16>(fn, args, begin, end);
    case Type::f16: return run_as<f16>(fn, args, begin, end);
  }
  return false;
}

}  // namespace softmax_ext::SX_ISA

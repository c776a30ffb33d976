// A few long rows interleaved element by element (2 <= inner < 16): each (V, inner) plane is transposed into scratch,
// where its rows are contiguous and run like any other. Lanes would leave most of a register idle there.
#pragma once
#include <type_traits>

#include "rows.h"
#include "scratch.h"
#include "vec.h"

namespace softmax_ext::SX_ISA {

template <class T> bool run_as(Fn fn, const void* args, int64_t begin, int64_t end);

// (V, inner) to (inner, V), a strip at a time so that a strip's lines are still in L1 for the next row.
template <class E> void transpose_plane(const E* from, E* to, int64_t V, int64_t inner) {
  for (int64_t b = 0; b < V; b += 256)
    for (int64_t i = 0; i < inner; ++i)
      for (int64_t v = b; v < V && v < b + 256; ++v) to[i * V + v] = from[v * inner + i];
}
template <class E> void transpose_back(const E* from, E* to, int64_t V, int64_t inner) {
  for (int64_t b = 0; b < V; b += 256)
    for (int64_t i = 0; i < inner; ++i)
      for (int64_t v = b; v < V && v < b + 256; ++v) to[v * inner + i] = from[i * V + v];
}

// The planes of a call and scratch for two of them.
template <class T> struct Planes {
  Layout whole, rows;
  Scratch scratch;
  explicit Planes(const Layout& y)
      : whole(y), rows{y.inner, y.V, 1}, scratch(2 * size() * (int64_t)sizeof(Compute<T>)) {}
  int64_t size() const { return whole.V * whole.inner; }
  T* first() const { return (T*)scratch.p; }
  void* second() const { return (Compute<T>*)scratch.p + size(); }
  template <class E> E* in(const void* array, int64_t o, void* to) const {
    transpose_plane((const E*)array + o * size(), (E*)to, whole.V, whole.inner);
    return (E*)to;
  }
  void out(void* array, int64_t o) const {
    transpose_back(first(), (T*)array + o * size(), whole.V, whole.inner);
  }
  // where plane o of a row-shaped array begins
  template <class E, class P> P* at(P* array, int64_t o) const {
    using Bytes = std::conditional_t<std::is_const_v<P>, const char, char>;
    return array ? (Bytes*)array + o * whole.inner * (int64_t)sizeof(E) : nullptr;
  }
};

template <class T> bool planes(const SoftmaxFwd& a, const Planes<T>& p, int64_t o) {
  SoftmaxFwd b{p.rows, a.type, p.template in<T>(a.x, o, p.first()), p.first()};
  if (!run_as<T>(Fn::softmax_fwd, &b, 0, p.rows.outer)) return false;
  p.out(a.y, o);
  return true;
}
template <class T> bool planes(const SoftmaxBwd& a, const Planes<T>& p, int64_t o) {
  SoftmaxBwd b{p.rows, a.type, p.template in<T>(a.dy, o, p.first()), p.template in<T>(a.y, o, p.second()), p.first()};
  if (!run_as<T>(Fn::softmax_bwd, &b, 0, p.rows.outer)) return false;
  p.out(a.dx, o);
  return true;
}
template <class T> bool planes(const LogSoftmaxFwd& a, const Planes<T>& p, int64_t o) {
  using F = Compute<T>;
  LogSoftmaxFwd b{p.rows,    a.type, p.template in<T>(a.x, o, p.first()), p.first(), p.template at<F>(a.m, o),
                  p.template at<F>(a.rest, o)};
  if (!run_as<T>(Fn::log_softmax_fwd, &b, 0, p.rows.outer)) return false;
  p.out(a.y, o);
  return true;
}
template <class T> bool planes(const LogSoftmaxBwd& a, const Planes<T>& p, int64_t o) {
  using F = Compute<T>;
  LogSoftmaxBwd b{p.rows,
                  a.type,
                  p.template in<T>(a.dy, o, p.first()),
                  p.template in<T>(a.x, o, p.second()),
                  p.template at<F>(a.m, o),
                  p.template at<F>(a.rest, o),
                  p.first()};
  if (!run_as<T>(Fn::log_softmax_bwd, &b, 0, p.rows.outer)) return false;
  p.out(a.dx, o);
  return true;
}
template <class T> bool planes(const CrossEntropy& a, const Planes<T>& p, int64_t o, Fn fn) {
  using F = Compute<T>;
  CrossEntropy b = a;
  b.layout = p.rows;
  b.logits = p.template in<T>(a.logits, o, p.first());
  b.dlogits = p.first();
  switch (a.target_kind) {
    case Target::i64: b.target = p.template at<int64_t>(a.target, o); break;
    case Target::i32: b.target = p.template at<int32_t>(a.target, o); break;
    case Target::dense_logits_type: b.target = p.template in<T>(a.target, o, p.second()); break;
    case Target::dense_compute_type: b.target = p.template in<F>(a.target, o, p.second()); break;
  }
  for (void** q : {&b.nll, &b.lse, &b.smooth, &b.entropy, &b.m, &b.rest}) *q = p.template at<F>(*q, o);
  for (const void** q : {&b.d_nll, &b.d_lse, &b.d_smooth, &b.d_entropy}) *q = p.template at<F>(*q, o);
  if (!run_as<T>(fn, &b, 0, p.rows.outer)) return false;
  if (fn != Fn::cross_entropy_fwd) p.out(a.dlogits, o);
  return true;
}

// Planes [begin, end) of a call on `args`.
template <class T, class Args, class... Which>
bool each_plane(const Args& args, int64_t begin, int64_t end, Which... which) {
  Planes<T> p(args.layout);
  if (!p.scratch.p) return false;
  for (int64_t o = begin; o < end; ++o)
    if (!planes<T>(args, p, o, which...)) return false;
  return true;
}

}  // namespace softmax_ext::SX_ISA

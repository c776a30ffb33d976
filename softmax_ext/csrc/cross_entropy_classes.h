// cross_entropy of K classes a row: the row itself as if it had no target, then the K entries that have one.
//
//   nll_k = (m - z) + L at the id (masked_nll where that is infinite)
//   dz_j  = (A - a_j) p_j - a_j q_j - what smoothing and entropy add,  a_j = sum of d_nll_k over id_k = j,
//   A     = sum of all a_j + d_lse + d_smooth sum w: all that multiplies p_j
//
// The logits at the ids are read before the gradient may be written over them.
#pragma once
#include "cross_entropy.h"
#include "dispatch.h"
#include "picked.h"
#include "scratch.h"

namespace softmax_ext::SX_ISA {

// The rows of a unit are consecutive in row-shaped arrays.
inline void rows_of_unit(const Layout& y, int64_t u, int64_t& first, int64_t& count) {
  int64_t stop;
  switch (way_of(y)) {
    case Way::wide: first = u, stop = u + 1; break;
    case Way::planes: first = u * y.inner, stop = first + y.inner; break;
    case Way::strips: {
      int64_t tiles = strip_units(y), i = u % tiles * unit_lanes;
      first = u / tiles * y.inner + i;
      stop = first + (i + unit_lanes < y.inner ? unit_lanes : y.inner - i);
      break;
    }
    default: first = u * unit_lanes, stop = first + unit_lanes < y.rows() ? first + unit_lanes : y.rows();
  }
  count = stop - first;
}

// What equals what among K ids: slot k's first equal is first(k). Open addressing, cleared for each row.
struct Equal {
  int64_t size = 4, *table, *ids;
  Equal(int64_t K, void* room) : table((int64_t*)room) {
    while (size < 2 * K) size *= 2;
    ids = table + size;
  }
  static int64_t bytes(int64_t K) { return (8 + 5 * K) * 8; }
  void clear() { std::memset(table, -1, (size_t)size * 8); }
  int64_t first(int64_t k, int64_t id) {
    ids[k] = id;
    auto h = (uint64_t)id * 0x9e3779b97f4a7c15u >> 20;
    for (;; ++h) {
      int64_t& at = table[h & (uint64_t)(size - 1)];
      if (at < 0) at = k;
      if (ids[at] == id) return at;
    }
  }
};

template <class T, Do what> struct ClassesOfRows {
  using F = Compute<T>;
  const CrossEntropy& a;
  Transform<F> tr;
  F* x;            // (rows of the unit, K): the logits at the ids
  double* mass;    // (K,)
  double* after;   // (K,): the mass of classes that are first named after this slot
  int64_t* first;  // (K,)
  Equal equal;

  int64_t inner() const { return a.layout.inner; }
  // where a row begins in an array of `size` along the classes
  int64_t base(int64_t r, int64_t size) const { return r / inner() * size * inner() + r % inner(); }
  int64_t id(int64_t at, int64_t k) const { return id_at(a.ids, a.ids_kind, at + k * inner()); }
  bool names(int64_t v) const { return v >= 0 && v < a.layout.V; }

  // Reads a row's logits; its target (a class, ignored or invalid) and what multiplies all its p_j beside d_lse.
  void read(int64_t r, F* to, int64_t& target, double& sum) const {
    const int64_t at = base(r, a.K);
    const T* logits = (const T*)a.logits + base(r, a.layout.V);
    target = -1, sum = 0;
    for (int64_t k = 0; k < a.K; ++k) {
      int64_t v = id(at, k);
      if (v == -1) continue;
      if (!names(v)) target = -2;
      else if (target == -1) target = v;
      to[k] = names(v) ? get(logits + v * inner()) : F(0);
      if (a.d_nll) sum += row_value<F>(a.d_nll, at + k * inner());
    }
  }
  void write_nll(int64_t r, const F* x) const {
    const int64_t at = base(r, a.K);
    const double m = row_value<F>(a.m, r), L = log1p_positive(row_value<F>(a.rest, r));
    for (int64_t k = 0; k < a.K; ++k) {
      int64_t v = id(at, k);
      double d = names(v) ? m - (double)(tr.on ? tr.one(x[k]) : x[k]) : nan;
      // in F, as a row's own sums: beyond F's range is infinite
      double nll = v == -1 ? 0 : L == L && (F)d == (F)inf ? masked_nll : d + L;
      set_row<F>(a.nll, at + k * inner(), nll);
    }
  }
  // The entropy that a gradient told m and rest of whole rows takes: of the classes here, which may be a shard's. From
  // that of these classes alone, whose m and rest are own_m and own_rest.
  double entropy_here(int64_t r, double entropy, double own_m, double own_rest) const {
    const double d = own_m - row_value<F>(a.m, r), rest = row_value<F>(a.rest, r), L = log1p_positive(rest);
    const double share = __builtin_exp(d) * (1 + own_rest) / (1 + rest);
    return d == -inf ? L : L + share * (entropy - (d + log1p_positive(own_rest)));
  }
  void write_gradient(int64_t r, const F* x, double sum, double entropy) {
    const int64_t at = base(r, a.K);
    const double m = row_value<F>(a.m, r), rest = row_value<F>(a.rest, r);
    const F* w = (const F*)a.weight;
    T* out = (T*)a.dlogits + base(r, a.layout.V);
    equal.clear();
    for (int64_t k = 0; k < a.K; ++k) {
      int64_t v = id(at, k);
      first[k] = v == -1 ? -1 : equal.first(k, v);
      if (v == -1) continue;
      double own = row_value<F>(a.d_nll, at + k * inner());
      mass[first[k]] = first[k] == k ? own : mass[first[k]] + own;
    }
    GradRow g(rest, 1, a.weight_sum, entropy, sum, row_value<F>(a.d_lse, r), row_value<F>(a.d_smooth, r),
              row_value<F>(a.d_entropy, r));
    // The others' mass is summed, not all less this class's: one of K may hold nearly all of it.
    double before = 0, later = 0;
    for (int64_t k = a.K; k-- > 0;) after[k] = later, later += first[k] == k ? mass[k] : 0;
    const double beside = g.others;
    const int64_t heavy = rest < 1 && g.smooth != 0 ? a.heavy : -1;
    for (int64_t k = 0; k < a.K; ++k) {
      if (first[k] != k) continue;
      int64_t v = id(at, k);
      const double aside = before + after[k], d = (double)(tr.on ? tr.one(x[k]) : x[k]) - m;
      before += mass[k];
      g.nll = mass[k], g.others = aside + beside;
      double dz = v == heavy && d == 0 ? g.at_heavy(aside, a.weight_aside) : g.at_target(d, w ? (double)w[v] : 1);
      put(out + v * inner(), (F)(dz * (tr.on ? (double)tr.slope_one(x[k]) : 1)));
    }
  }
};

// Units [begin, end) of a call on K classes a row; dense(fn, args, begin, end) runs rows of one target.
template <class T, Do what, class Dense>
bool classes_of_rows(Fn fn, const CrossEntropy& a, int64_t begin, int64_t end, Dense dense) {
  using F = Compute<T>;
  const int64_t most = way_of(a.layout) == Way::planes ? a.layout.inner : way_of(a.layout) == Way::wide ? 1 : unit_lanes;
  const int64_t per_row = 8 + 8 + 4 * (int64_t)sizeof(F), room = most * (per_row + a.K * (int64_t)sizeof(F));
  Scratch scratch(room + 64 + 24 * a.K + Equal::bytes(a.K));
  if (!scratch.p) return false;
  double* sums = (double*)scratch.p;
  int64_t* targets = (int64_t*)(sums + most);
  double* mass = (double*)(targets + most);
  double* after = mass + a.K;
  int64_t* first = (int64_t*)(after + a.K);
  char* table = (char*)(first + a.K);
  F* lse = (F*)(table + Equal::bytes(a.K));
  F *entropy = lse + most, *own_m = entropy + most, *own_rest = own_m + most, *x = own_rest + most;
  ClassesOfRows<T, what> rows{a, {a.scale, a.softcap}, x, mass, after, first, Equal(a.K, table)};
  // where a row-shaped array of the unit's rows would begin if it had all rows
  auto of_all = [](void* p, int64_t r0, int64_t size) { return (void*)((uintptr_t)p - (uintptr_t)(r0 * size)); };
  for (int64_t u = begin; u < end; ++u) {
    int64_t r0, n;
    rows_of_unit(a.layout, u, r0, n);
    CrossEntropy one = a;
    one.ids = nullptr;
    one.target = of_all(targets, r0, 8), one.target_kind = Target::i64;
    one.nll = nullptr, one.d_nll = nullptr, one.d_lse = of_all(lse, r0, sizeof(F));
    for (int64_t i = 0; i < n; ++i) {
      rows.read(r0 + i, x + i * a.K, targets[i], sums[i]);
      lse[i] = (F)(sums[i] + row_value<F>(a.d_lse, r0 + i));
    }
    if (what != Do::fwd && a.d_entropy) {
      CrossEntropy h = one;
      h.lse = h.smooth = nullptr;
      h.entropy = of_all(entropy, r0, sizeof(F));
      h.m = of_all(own_m, r0, sizeof(F)), h.rest = of_all(own_rest, r0, sizeof(F));
      if (!dense(Fn::cross_entropy_fwd, h, u, u + 1)) return false;
    }
    if (!dense(fn, one, u, u + 1)) return false;
    for (int64_t i = 0; i < n; ++i) {
      if (what != Do::bwd) rows.write_nll(r0 + i, x + i * a.K);
      if (what == Do::fwd || targets[i] < 0 || row_value<F>(a.rest, r0 + i) != row_value<F>(a.rest, r0 + i)) continue;
      double H = a.d_entropy ? rows.entropy_here(r0 + i, entropy[i], own_m[i], own_rest[i]) : 0;
      rows.write_gradient(r0 + i, x + i * a.K, sums[i], H);
    }
  }
  return true;
}

}  // namespace softmax_ext::SX_ISA

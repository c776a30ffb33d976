// Every row function once on buffers of exactly the size they must have: what the drivers beside this file share.
#pragma once
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "rows.h"
#include "sorted.h"

using namespace softmax_ext;

inline int64_t size_of(Type t) { return t == Type::f64 ? 8 : t == Type::f32 ? 4 : 2; }

// Memory that ends where nothing may be read. One per live guarded buffer, last taken first returned.
struct Guarded {
  static constexpr size_t page = 65536, room = 16 * page;  // a multiple of every page size in use
  char* end;
  Guarded() {
    char* p = (char*)mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + room, page, PROT_NONE)) std::abort();
    end = p + room;
  }
  static Guarded& at(size_t i) {
    static Guarded all[24];
    return all[i];
  }
  static inline size_t live = 0;
};

// Exactly `count` elements. Shifted: the first `shift` elements past malloc's alignment, the last byte touching the
// sanitiser's red zone. Not shifted: the last byte touching a page that faults, because masked vector loads and stores
// escape the sanitiser.
struct Buffer {
  char *raw = nullptr, *p;
  size_t bytes;
  Buffer(int64_t count, int64_t size, int64_t shift) : bytes((size_t)(count * size)) {
    if (shift == 0 && bytes <= Guarded::room) p = Guarded::at(Guarded::live++).end - bytes;
    else raw = (char*)std::malloc(bytes + (size_t)(shift * size)), p = raw + shift * size;
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (raw) std::free(raw);
    else --Guarded::live;
  }
};

inline void fill(Buffer& b, int64_t n, Type t, unsigned seed) {
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 1664525u + 1013904223u;
    float f = (float)(seed >> 8) * 0x1p-22f - 2;
    if (seed % 97 == 0) f = -__builtin_inff();
    double d = f;
    uint32_t u;
    std::memcpy(&u, &f, 4);
    uint16_t h = t == Type::bf16 ? (uint16_t)(u >> 16) : (uint16_t)(seed >> 18 & 0x43ff);
    if (t == Type::f64) std::memcpy(b.p + i * 8, &d, 8);
    else if (t == Type::f32) std::memcpy(b.p + i * 4, &f, 4);
    else std::memcpy(b.p + i * 2, &h, 2);
  }
}

// Calls each(fn, args, outputs) for every row function and every kind of target and option.
template <class Each> void drive(Layout y, Type type, int64_t shift, Each each) {
  int64_t n = y.outer * y.V * y.inner, rows = y.rows(), s = size_of(type);
  Type F = type == Type::f64 ? Type::f64 : Type::f32;
  int64_t f = size_of(F);
  Buffer x(n, s, shift), z(n, s, shift), out(n, s, shift), w(y.V, f, shift), soft(n, f, shift), target(rows, 8, shift);
  Buffer nll(rows, f, shift), lse(rows, f, shift), smooth(rows, f, shift), entropy(rows, f, shift);
  Buffer m(rows, f, shift), rest(rows, f, shift), d(rows, f, shift);
  fill(x, n, type, 1), fill(z, n, type, 2), fill(w, y.V, F, 3), fill(soft, n, F, 4), fill(d, rows, F, 5);
  SoftmaxFwd sf{y, type, x.p, out.p};
  each(Fn::softmax_fwd, &sf, {&out});
  SoftmaxBwd sb{y, type, z.p, x.p, out.p};
  each(Fn::softmax_bwd, &sb, {&out});
  LogSoftmaxFwd lf{y, type, x.p, out.p, m.p, rest.p};
  each(Fn::log_softmax_fwd, &lf, {&out, &m, &rest});
  LogSoftmaxBwd lb{y, type, z.p, x.p, m.p, rest.p, out.p};
  each(Fn::log_softmax_bwd, &lb, {&out});
  const int64_t odd[] = {0, -1, y.V - 1, -2, y.V, INT64_MAX, INT64_MIN, y.V / 2};
  for (int mode = 0; mode < 7; ++mode) {
    CrossEntropy c{};
    c.layout = y, c.type = type, c.logits = x.p, c.scale = mode == 2 ? 0.5 : 1, c.softcap = mode == 3 ? 5 : 0;
    c.target = target.p, c.target_kind = mode == 1 ? Target::i32 : Target::i64;
    for (int64_t i = 0; i < rows; ++i) {
      int32_t narrow = (int32_t)odd[i % 8];
      if (mode == 1) std::memcpy(target.p + i * 4, &narrow, 4);
      else std::memcpy(target.p + i * 8, &odd[i % 8], 8);
    }
    if (mode == 4) c.target = soft.p, c.target_kind = Target::dense_compute_type;
    if (mode == 5) c.target = z.p, c.target_kind = Target::dense_logits_type;
    if (mode >= 3) c.weight = w.p;
    c.nll = nll.p, c.lse = lse.p, c.m = m.p, c.rest = rest.p;
    std::vector<Buffer*> results{&nll, &lse, &m, &rest};
    if (mode) {
      c.smooth = smooth.p, c.entropy = entropy.p, c.d_entropy = d.p, c.d_smooth = d.p, c.d_lse = d.p;
      results.insert(results.end(), {&smooth, &entropy});
    }
    c.d_nll = d.p, c.dlogits = out.p;
    prepare(c);
    each(Fn::cross_entropy_fwd, &c, results);
    each(Fn::cross_entropy_bwd, &c, {&out});
    results.push_back(&out);
    Buffer over(n, s, shift);
    if (mode == 6) {  // over the logits, as the doors' in-place calls
      if (n > 0) std::memcpy(over.p, x.p, over.bytes);
      c.logits = over.p, c.dlogits = over.p, c.m = c.rest = nullptr;
      results = {};
    }
    each(Fn::cross_entropy_fwd_bwd, &c, results);
  }
  for (int64_t K : {0, 1, 5}) {  // K classes a row, markers, repeated ids and ids of no class among them
    const bool narrow = K == 1;
    Buffer ids(rows * K, narrow ? 4 : 8, shift), each_nll(rows * K, f, shift), each_d(rows * K, f, shift);
    fill(each_d, rows * K, F, 6);
    for (int64_t i = 0; i < rows * K; ++i) {
      const int64_t id = i % 17 == 16 ? odd[i % 8] : i % 3 == 0 ? -1 : y.V - 1 - i % 2;
      const int32_t few = (int32_t)id;
      if (narrow) std::memcpy(ids.p + i * 4, &few, 4);
      else std::memcpy(ids.p + i * 8, &id, 8);
    }
    CrossEntropy c{};
    c.layout = y, c.type = type, c.logits = x.p, c.scale = 1, c.softcap = K == 5 ? 5 : 0;
    c.ids = K ? (const void*)ids.p : (const void*)&K, c.ids_kind = narrow ? Target::i32 : Target::i64, c.K = K;
    c.weight = w.p, c.nll = each_nll.p, c.lse = lse.p, c.m = m.p, c.rest = rest.p, c.d_nll = each_d.p;
    std::vector<Buffer*> results{&each_nll, &lse, &m, &rest};
    if (K == 5) c.smooth = smooth.p, c.entropy = entropy.p, c.d_entropy = c.d_smooth = c.d_lse = d.p;
    if (K == 5) results.insert(results.end(), {&smooth, &entropy});
    c.dlogits = out.p;
    prepare(c);
    each(Fn::cross_entropy_fwd, &c, results);
    each(Fn::cross_entropy_bwd, &c, {&out});
    results.push_back(&out);
    each(Fn::cross_entropy_fwd_bwd, &c, results);
  }
}

// Calls each(fn, args, units, outputs) for the functions of K classes a row: N rows of D numbers, V classes.
template <class Each>
void drive_classes(int64_t N, int64_t D, int64_t V, int64_t K, Type type, int64_t shift, Each each) {
  int64_t s = size_of(type);
  Type F = type == Type::f64 ? Type::f64 : Type::f32;
  int64_t f = size_of(F);
  Buffer x(N * D, s, shift), w(V * D, s, shift), ids(N * K, 4, shift), c(N * K, f, shift), z(N * K, f, shift);
  Buffer by_row(N, f, shift), by_class(V, f, shift), of_all(D, f, shift), dx(N * D, s, shift), dw(V * D, s, shift);
  fill(x, N * D, type, 1), fill(w, V * D, type, 2), fill(c, N * K, F, 3), fill(of_all, D, F, 4);
  fill(by_row, N, F, 5), fill(by_class, V, F, 6);
  const int32_t odd[] = {-1, -2, (int32_t)V, INT32_MAX, INT32_MIN};
  for (int64_t i = 0; i < N * K; ++i) {
    int32_t id = i % 7 == 3 || V == 0 ? odd[i / 7 % 5] : (int32_t)(i * 5 % V);
    std::memcpy(ids.p + i * 4, &id, 4);
  }
  Picked p{};
  p.layout = {N, D, 1}, p.type = type, p.x = x.p, p.w = w.p, p.ids = ids.p, p.ids_kind = Target::i32, p.K = K, p.V = V;
  p.z = z.p, p.c = c.p, p.C = K, p.of_all = of_all.p, p.dx = dx.p, p.dw = dw.p;
  each(Fn::picked_fwd, &p, plan(p).units, {&z});
  p.by = by_row.p;
  each(Fn::picked_input_bwd, &p, plan(p).units, {&dx});
  if (K > 1) p.C = 1;
  p.by = by_class.p;
  Sorted sorted(p);
  while (sorted.next()) each(Fn::picked_weight_bwd, &p, plan(p).units, {&dw});

  if (V == 0) return;
  Buffer logits(N * V, s, shift), m(N, f, shift), rest(N, f, shift), u(N * K, 4, shift), points(N * K, 4, shift);
  Buffer mass(2 * N, f, shift), span(6 * N, f, shift);
  fill(logits, N * V, type, 7), fill(span, 6 * N, F, 8);
  CrossEntropy e{};
  Buffer target(N, 8, shift), nothing(N, f, shift);
  std::memset(target.p, 0, target.bytes);
  e.layout = {N, V, 1}, e.type = type, e.logits = logits.p, e.target = target.p, e.scale = 1;
  e.nll = e.lse = nothing.p, e.m = m.p, e.rest = rest.p;
  prepare(e);
  if (!run(Fn::cross_entropy_fwd, &e, 0, plan(e).units)) std::abort();
  const float us[] = {0, 0x1.fffffep-1f, 0.5f, 0.25f};
  for (int64_t i = 0; i < N * K; ++i) std::memcpy(u.p + i * 4, &us[i % 4], 4);
  for (bool elsewhere : {false, true}) {
    Points q{};
    q.layout = e.layout, q.type = type, q.logits = logits.p, q.m = m.p, q.rest = rest.p, q.except = ids.p;
    q.except_kind = Target::i32, q.E = K, q.u = (const float*)u.p, q.K = K, q.span = elsewhere ? span.p : nullptr;
    q.scale = 1, q.softcap = elsewhere ? 3 : 0, q.ids = (int32_t*)points.p, q.mass = mass.p;
    each(Fn::points, &q, plan(q).units, {&points, &mass});
  }
}

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
}

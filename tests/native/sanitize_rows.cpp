// Every row function at every V from 0 to two vectors plus one (and the block edges), every type, instruction set and
// layout, on buffers of exactly the size they must have and off alignment by every element of a vector's quarter.
// Run under the address and undefined-behaviour sanitisers: `make sanitize`. Prints one line and returns 0.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "rows.h"

using namespace softmax_ext;

namespace {

int64_t size_of(Type t) { return t == Type::f64 ? 8 : t == Type::f32 ? 4 : 2; }

// Exactly `count` elements, the last byte touching the red zone, the first `shift` elements past malloc's alignment.
struct Buffer {
  char* raw;
  char* p;
  Buffer(int64_t count, int64_t size, int64_t shift)
      : raw((char*)std::malloc((size_t)((count + shift) * size))), p(raw + shift * size) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(raw); }
};

void fill(Buffer& b, int64_t n, Type t, unsigned seed) {
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 1664525u + 1013904223u;
    float f = (float)(seed >> 8) * 0x1p-22f - 2;
    if (seed % 97 == 0) f = -__builtin_inff();
    if (t == Type::f64) { double d = f; std::memcpy(b.p + i * 8, &d, 8); }
    else if (t == Type::f32) std::memcpy(b.p + i * 4, &f, 4);
    else { uint32_t u; std::memcpy(&u, &f, 4); uint16_t h = t == Type::bf16 ? (uint16_t)(u >> 16) : (uint16_t)(seed >> 18 & 0x43ff); std::memcpy(b.p + i * 2, &h, 2); }
  }
}

int64_t calls = 0;

void one(Layout y, Type type, int64_t shift) {
  int64_t n = y.outer * y.V * y.inner, rows = y.rows(), s = size_of(type);
  Type F = type == Type::f64 ? Type::f64 : Type::f32;
  int64_t f = size_of(F);
  Plan p = plan(y);
  if (n == 0) return;
  Buffer x(n, s, shift), z(n, s, shift), out(n, s, shift), w(y.V, f, shift), soft(n, f, shift), target(rows, 8, shift);
  Buffer r1(rows, f, shift), r2(rows, f, shift), r3(rows, f, shift), r4(rows, f, shift), m(rows, f, shift), rest(rows, f, shift), d(rows, f, shift);
  fill(x, n, type, 1), fill(z, n, type, 2), fill(w, y.V, F, 3), fill(soft, n, F, 4), fill(d, rows, F, 5);
  auto all = [&](Fn fn, const void* a) { ++calls; if (!run(fn, a, 0, p.units)) std::abort(); };
  SoftmaxFwd sf{y, type, x.p, out.p};
  all(Fn::softmax_fwd, &sf);
  SoftmaxBwd sb{y, type, z.p, x.p, out.p};
  all(Fn::softmax_bwd, &sb);
  LogSoftmaxFwd lf{y, type, x.p, out.p, m.p, rest.p};
  all(Fn::log_softmax_fwd, &lf);
  LogSoftmaxBwd lb{y, type, z.p, x.p, m.p, rest.p, out.p};
  all(Fn::log_softmax_bwd, &lb);
  int64_t odd[] = {0, -1, y.V - 1, -2, y.V, INT64_MAX, INT64_MIN, y.V / 2};
  for (int mode = 0; mode < 6; ++mode) {
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
    c.nll = r1.p, c.lse = r2.p, c.m = m.p, c.rest = rest.p;
    if (mode) c.smooth = r3.p, c.entropy = r4.p, c.d_entropy = d.p, c.d_smooth = d.p, c.d_lse = d.p;
    c.d_nll = d.p, c.dlogits = out.p;
    prepare(c);
    all(Fn::cross_entropy_fwd, &c);
    all(Fn::cross_entropy_bwd, &c);
    all(Fn::cross_entropy_fwd_bwd, &c);
  }
}

}  // namespace

int main() {
  for (int level = 0; level <= 2; ++level) {
    if (limit_instruction_set(level) != level) continue;
    for (Type t : {Type::f32, Type::f64, Type::bf16, Type::f16}) {
      for (int64_t V = 0; V <= 33; ++V)
        for (int64_t inner : {1, 2, 7, 15, 16, 17, 33})
          for (int64_t outer : {1, 5, 17}) one({outer, V, inner}, t, (V + inner + outer) % 5);
      for (int64_t V : {127, 128, 129, 130, 143, 144, 145, 160, 161, 255, 256, 257})
        for (int64_t shift = 0; shift < 5; ++shift) one({3, V, 1}, t, shift);
      for (int64_t V : {4095, 4096, 4097, 8191, 8193, 8200}) one({2, V, 1}, t, 1), one({1, V, 3}, t, 1);
      one({1, 9, 130}, t, 1), one({70, 3, 1}, t, 1), one({129, 1, 1}, t, 1);
    }
  }
  std::printf("%lld calls, instruction set %s\n", (long long)calls, instruction_set_name());
}

// The order that sorted.h leaves pairs (row, class) in: each class's together and in the order of their rows, so that a
// sum over them is the same in every run; no pair lost, twice, or another class's. 0 if so.
#include <cstdio>

#include "sorted.h"

using namespace softmax_ext;

namespace {

int fail(const char* what) {
  std::puts(what);
  return 1;
}

int judge(int64_t N, int64_t K, int64_t V, Target kind) {
  uint32_t seed = (uint32_t)(N + K + V);
  std::vector<int64_t> wide((size_t)(N * K)), count((size_t)V);
  for (int64_t& v : wide) {
    seed = seed * 1664525u + 1013904223u;
    v = (int64_t)(seed >> 12) % (V + 4) - 2;  // markers and what is out of range among them
    if (seed >> 30 == 0 && V > 2) v = 2;      // a class that many rows name
    if (v >= 0 && v < V) ++count[v];
  }
  std::vector<int32_t> narrow(wide.begin(), wide.end());
  Picked a{};
  a.layout = {N, 1, 1}, a.K = K, a.V = V, a.ids_kind = kind;
  a.ids = kind == Target::i64 ? (const void*)wide.data() : (const void*)narrow.data();
  Sorted sorted(a);
  int64_t done = 0;
  while (sorted.next()) {
    const Pairs& p = *a.pairs;
    if (p.from != done || p.to <= p.from || p.to > V) return fail("a range does not follow the one before");
    done = p.to;
    if (p.unit[0] != p.from || p.unit[Pairs::units] != p.to) return fail("the units are not the range");
    for (int64_t u = 0; u < Pairs::units; ++u)
      if (p.unit[u] > p.unit[u + 1]) return fail("a unit's end lies before its begin");
    const bool some = p.start[p.to] > p.start[p.from];
    if (some && !p.small && !p.large && p.to - p.from != 1) return fail("no room for several classes");
    for (int64_t v = p.from; v < p.to; ++v) {
      const int64_t n = p.start[v + 1] - p.start[v], first = p.start[v] - p.start[p.from];
      if (n != count[v]) return fail("a class has too many pairs, or too few");
      if (!p.small && !p.large) continue;
      for (int64_t i = 0, before = -1; i < n; ++i) {
        const int64_t pair = p.small ? (int64_t)p.small[first + i] : p.large[first + i];
        if (pair < 0 || pair >= N * K || wide[pair] != v) return fail("a pair is another class's");
        if (pair <= before) return fail("a class's pairs are not in the order of their rows");
        before = pair;
      }
    }
  }
  return done == V ? 0 : fail("classes are left");
}

}  // namespace

int main() {
  for (Target kind : {Target::i64, Target::i32}) {
    int found = judge(700, 9, 40, kind) | judge(5, 3, 1000, kind) | judge(3000, 25, 7, kind) | judge(1, 1, 1, kind);
    if (found | judge(4, 0, 6, kind) | judge(0, 4, 6, kind) | judge(6, 4, 0, kind)) return 1;
  }
  return 0;
}

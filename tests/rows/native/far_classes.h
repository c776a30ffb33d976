// Places of more than 2^32 pairs (row, class), counted in 64 bits: the last rows of arrays whose address space is taken
// and whose memory, but for these rows, is never touched.
#pragma once
#include "drive_rows.h"

template <class T> T* far_array(int64_t count) {
  void* p = mmap(nullptr, (size_t)count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (T*)p;
}

inline void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "beyond 2^32 pairs: %s\n", what);
  std::abort();
}

// False where the address space cannot be had.
inline bool far_classes() {
  const int64_t N = 1 << 20, K = (1 << 12) + 1, D = 3, V = 5, last = N - 1, pairs = N * K;
  int32_t *ids = far_array<int32_t>(pairs), *points = far_array<int32_t>(pairs);
  float *z = far_array<float>(pairs), *c = far_array<float>(pairs), *u = far_array<float>(pairs);
  float *x = far_array<float>(N * D), *dx = far_array<float>(N * D), *logits = far_array<float>(N * V);
  float *m = far_array<float>(N), *rest = far_array<float>(N), *mass = far_array<float>(2 * N);
  float* grad = far_array<float>(N * V);
  void* const arrays[] = {ids, points, z, c, u, x, dx, logits, m, rest, mass, grad};
  for (void* p : arrays)
    if (!p) return false;
  float w[V * D];
  for (int64_t i = 0; i < V * D; ++i) w[i] = (float)i;
  for (int64_t d = 0; d < D; ++d) x[last * D + d] = 1;
  for (int64_t k = 0; k < K; ++k) ids[last * K + k] = (int32_t)(k % V), c[last * K + k] = k < V ? 1 : 0, u[last * K + k] = 0.5f;

  Picked p{};
  p.layout = {N, D, 1}, p.type = Type::f32, p.x = x, p.w = w, p.ids = ids, p.ids_kind = Target::i32, p.K = K, p.V = V;
  p.z = z, p.c = c, p.C = K, p.dx = dx;
  const int64_t units = plan(p).units;
  must(run(Fn::picked_fwd, &p, units - 1, units), "picked_fwd runs");
  for (int64_t k = 0; k < K; ++k) must(z[last * K + k] == (float)(9 * (k % V) + 3), "picked_fwd");
  must(run(Fn::picked_input_bwd, &p, units - 1, units), "picked_input_bwd runs");
  for (int64_t d = 0; d < D; ++d) must(dx[last * D + d] == (float)(30 + 5 * d), "picked_input_bwd");

  rest[last] = V - 1;
  Points q{};
  q.layout = {N, V, 1}, q.type = Type::f32, q.logits = logits, q.m = m, q.rest = rest, q.except = ids;
  q.except_kind = Target::i32, q.E = 1, q.u = u, q.K = K, q.scale = 1, q.ids = points, q.mass = mass;
  ids[last] = 2;  // the excepted class of the last row where there is one a row
  const int64_t rows = plan(q).units;
  must(run(Fn::points, &q, rows - 1, rows), "points runs");
  const int64_t expected[] = {0, 1, 3, 4};
  for (int64_t k = 0; k < K; ++k) {
    const int64_t at = (int64_t)(((double)k + 0.5) / (double)K * 4);
    must(points[last * K + k] == expected[at], "points");
  }

  CrossEntropy e{};
  e.layout = {N, V, 1}, e.type = Type::f32, e.logits = logits, e.ids = ids, e.ids_kind = Target::i32, e.K = K;
  e.scale = 1, e.nll = z, e.m = m, e.rest = rest, e.d_nll = c, e.dlogits = grad;
  prepare(e);
  const int64_t all = plan(e.layout).units;
  must(run(Fn::cross_entropy_fwd_bwd, &e, all - 1, all), "cross_entropy runs");
  must(z[last * K + K - 1] > 1.6f && z[last * K + K - 1] < 1.61f, "nll");  // log 5
  must(grad[last * V + 4] < 1e-6f && grad[last * V + 4] > -1e-6f, "gradient");  // 5 classes of mass 1 each, p = 1/5
  for (auto [at, bytes] : {std::pair<void*, int64_t>{ids, 4 * pairs}, {points, 4 * pairs}, {z, 4 * pairs}, {c, 4 * pairs},
                           {u, 4 * pairs}})
    munmap(at, (size_t)bytes);
  return true;
}

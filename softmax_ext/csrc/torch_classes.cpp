// The door's ops of K classes a row: points of a row's distribution, and x . W[id] with its derivatives.
#include "sorted.h"
#include "torch_door.h"

namespace {

using namespace softmax_ext;
using namespace softmax_ext::door;

Target integers(const Tensor& ids, const char* op, const char* name) {
  ScalarType t = ids.scalar_type();
  STD_TORCH_CHECK(ids.is_cpu() && (t == ScalarType::Long || t == ScalarType::Int), op, ": ", name,
                  " must hold int64 or int32.");
  return t == ScalarType::Long ? Target::i64 : Target::i32;
}

void check(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType type, const char* op, const char* name) {
  bool same = x.is_cpu() && x.dim() == (int64_t)sizes.size() && x.scalar_type() == type;
  int64_t i = 0;
  for (int64_t size : sizes) same = same && x.size(i++) == size;
  STD_TORCH_CHECK(same, op, ": ", name, " has the wrong shape or type.");
}

Tensor new_matrix(int64_t rows, int64_t columns, int32_t dtype, int64_t size) {
  int64_t sizes[2] = {rows, columns};
  Tensor y = new_of(2, sizes, dtype);
  advise_huge_pages(y.data_ptr(), rows * columns * size);
  return y;
}

// (ids (N, K), mass (N, 2)): see rows.h
std::tuple<Tensor, Tensor> points(const Tensor& logits0, const Tensor& m0, const Tensor& rest0, const Tensor& except0,
                                  const Tensor& u0, const MaybeTensor& span0, double scale,
                                  std::optional<double> softcap) {
  const char* op = "points";
  STD_TORCH_CHECK(logits0.dim() == 2, op, ": logits must have 2 dimensions.");
  Points a{};
  a.layout = layout_of(logits0, 1, op);
  a.type = type_of(logits0, op, "logits");
  STD_TORCH_CHECK(a.layout.V <= INT32_MAX, op, ": at most 2^31 - 1 classes.");
  ScalarType F = compute_type(a.type);
  const int64_t N = a.layout.outer;
  check_rows(m0, logits0, 1, F, op, "m");
  check_rows(rest0, logits0, 1, F, op, "rest");
  a.except_kind = integers(except0, op, "except");
  STD_TORCH_CHECK(except0.dim() == 2 && except0.size(0) == N, op, ": except must have shape (N, E).");
  STD_TORCH_CHECK(u0.dim() == 2 && u0.size(0) == N, op, ": u must have shape (N, K).");
  a.E = except0.size(1), a.K = u0.size(1);
  check(u0, {N, a.K}, ScalarType::Float, op, "u");
  if (span0) check(*span0, {N, 3, 2}, F, op, "span");
  STD_TORCH_CHECK(scale > 0, op, ": scale must be positive.");
  Tensor logits = dense(logits0), m = dense(m0), rest = dense(rest0), except = dense(except0), u = dense(u0);
  MaybeTensor span = span0 ? MaybeTensor(dense(*span0)) : span0;
  Tensor ids = new_matrix(N, a.K, aoti_torch_dtype_int32(), 4), mass = new_matrix(N, 2, dtype_of(F), 0);
  a.logits = logits.data_ptr(), a.m = m.data_ptr(), a.rest = rest.data_ptr(), a.except = except.data_ptr();
  a.u = (const float*)u.data_ptr(), a.span = span ? span->data_ptr() : nullptr;
  a.scale = scale, a.softcap = softcap && *softcap > 0 ? *softcap : 0;
  a.ids = (int32_t*)ids.data_ptr(), a.mass = mass.data_ptr();
  run_all(Fn::points, a);
  return {ids, mass};
}

// What the three products share: type, sizes and ids of a call.
Picked picked(const Tensor& of, const Tensor& ids, int64_t V, const char* op) {
  Picked a{};
  a.type = type_of(of, op, "the matrix");
  STD_TORCH_CHECK(of.is_cpu() && of.dim() == 2 && ids.dim() == 2, op, ": matrices and ids must have 2 dimensions.");
  a.layout = {ids.size(0), of.size(1), 1};
  a.ids_kind = integers(ids, op, "ids");
  a.K = ids.size(1), a.V = V;
  return a;
}

void add_coefficients(Picked& a, const Tensor& c, const char* op) {
  STD_TORCH_CHECK(c.dim() == 2, op, ": c must have 2 dimensions.");
  a.C = c.size(1);
  check(c, {a.layout.outer, a.C}, compute_type(a.type), op, "c");
  STD_TORCH_CHECK(a.C <= a.K && (a.C > 0 || a.K == 0), op, ": c must have 1 to K columns.");
}

void add_outer(Picked& a, int64_t rows, const MaybeTensor& by, const MaybeTensor& of_all, const char* op) {
  if (!by) return;
  STD_TORCH_CHECK(of_all.has_value(), op, ": by needs of_all.");
  check(*by, {rows}, compute_type(a.type), op, "by");
  check(*of_all, {a.layout.V}, compute_type(a.type), op, "of_all");
  a.by = by->data_ptr(), a.of_all = of_all->data_ptr();
}

Tensor picked_fwd(const Tensor& x0, const Tensor& w0, const Tensor& ids0) {
  const char* op = "picked_fwd";
  Picked a = picked(x0, ids0, w0.dim() == 2 ? w0.size(0) : 0, op);
  check(w0, {a.V, a.layout.V}, x0.scalar_type(), op, "w");
  check(x0, {a.layout.outer, a.layout.V}, x0.scalar_type(), op, "x");
  Tensor x = dense(x0), w = dense(w0), ids = dense(ids0);
  Tensor z = new_matrix(a.layout.outer, a.K, dtype_of(compute_type(a.type)), 0);
  a.x = x.data_ptr(), a.w = w.data_ptr(), a.ids = ids.data_ptr(), a.z = z.data_ptr();
  run_all(Fn::picked_fwd, a);
  return z;
}

Tensor gradient(Picked& a, int64_t rows, const Tensor& like, bool wide) {
  a.wide = wide;
  int32_t dtype = dtype_of(compute_type(a.type));
  if (!wide) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_matrix(rows, a.layout.V, dtype, wide ? 4 : (int64_t)like.element_size());
}

Tensor picked_input_bwd(const Tensor& c0, const Tensor& w0, const Tensor& ids0, const MaybeTensor& by0,
                        const MaybeTensor& of_all0, bool wide) {
  const char* op = "picked_input_bwd";
  Picked a = picked(w0, ids0, w0.dim() == 2 ? w0.size(0) : 0, op);
  add_coefficients(a, c0, op);
  Tensor c = dense(c0), w = dense(w0), ids = dense(ids0);
  MaybeTensor by = by0 ? MaybeTensor(dense(*by0)) : by0, of_all = of_all0 ? MaybeTensor(dense(*of_all0)) : of_all0;
  add_outer(a, a.layout.outer, by, of_all, op);
  Tensor dx = gradient(a, a.layout.outer, w0, wide);
  a.c = c.data_ptr(), a.w = w.data_ptr(), a.ids = ids.data_ptr(), a.dx = dx.data_ptr();
  run_all(Fn::picked_input_bwd, a);
  return dx;
}

Tensor picked_weight_bwd(const Tensor& c0, const Tensor& x0, const Tensor& ids0, int64_t classes,
                         const MaybeTensor& by0, const MaybeTensor& of_all0, bool wide) {
  const char* op = "picked_weight_bwd";
  STD_TORCH_CHECK(classes >= 0, op, ": classes must not be negative.");
  Picked a = picked(x0, ids0, classes, op);
  check(x0, {a.layout.outer, a.layout.V}, x0.scalar_type(), op, "x");
  add_coefficients(a, c0, op);
  Tensor c = dense(c0), x = dense(x0), ids = dense(ids0);
  MaybeTensor by = by0 ? MaybeTensor(dense(*by0)) : by0, of_all = of_all0 ? MaybeTensor(dense(*of_all0)) : of_all0;
  add_outer(a, classes, by, of_all, op);
  Tensor dw = gradient(a, classes, x0, wide);
  a.c = c.data_ptr(), a.x = x.data_ptr(), a.ids = ids.data_ptr(), a.dw = dw.data_ptr();
  Sorted sorted(a);
  while (sorted.next()) run_units(Fn::picked_weight_bwd, a);
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(softmax_ext, lib) {
  lib.def("points(Tensor logits, Tensor m, Tensor rest, Tensor except, Tensor u, Tensor? span, float scale, "
          "float? softcap) -> (Tensor, Tensor)");
  lib.def("picked_fwd(Tensor x, Tensor w, Tensor ids) -> Tensor");
  lib.def("picked_input_bwd(Tensor c, Tensor w, Tensor ids, Tensor? by, Tensor? of_all, bool wide) -> Tensor");
  lib.def("picked_weight_bwd(Tensor c, Tensor x, Tensor ids, int classes, Tensor? by, Tensor? of_all, bool wide) "
          "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CPU, lib) {
  lib.impl("points", TORCH_BOX(&points));
  lib.impl("picked_fwd", TORCH_BOX(&picked_fwd));
  lib.impl("picked_input_bwd", TORCH_BOX(&picked_input_bwd));
  lib.impl("picked_weight_bwd", TORCH_BOX(&picked_weight_bwd));
}

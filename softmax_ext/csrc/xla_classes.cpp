// The handlers of K classes a row: points of a row's distribution, and x . W[id] with its derivatives.
#include "sorted.h"
#include "xla_door.h"

namespace {

using namespace softmax_ext;
using namespace softmax_ext::door;

bool integers(const AnyBuffer& ids, Target& kind) {
  DataType t = ids.element_type();
  kind = t == DataType::S64 ? Target::i64 : Target::i32;
  return t == DataType::S64 || t == DataType::S32;
}
bool sizes(const AnyBuffer& x, std::initializer_list<int64_t> wanted) {
  auto d = x.dimensions();
  bool same = d.size() == wanted.size();
  size_t i = 0;
  for (int64_t size : wanted) {
    same = same && d[i] == size;
    ++i;
  }
  return same;
}
bool is(const AnyBuffer& x, std::initializer_list<int64_t> wanted, DataType type) {
  return x.element_type() == type && sizes(x, wanted);
}

#define SX_CHECK(condition, what) \
  if (!(condition)) return wrong(op, what)

// spans: none or one buffer, (N, 3, 2)
Error points(ffi::ThreadPool pool, AnyBuffer logits, AnyBuffer m, AnyBuffer rest, AnyBuffer except, AnyBuffer u,
             ffi::RemainingArgs spans, Out ids, Out mass, double scale, double softcap) {
  const char* op = "points";
  Points a{};
  SX_CHECK(type_of(logits.element_type(), a.type), "unsupported element type.");
  SX_CHECK(logits.dimensions().size() == 2 && layout_of(logits, 1, a.layout), "logits must have 2 dimensions.");
  DataType F = compute_type(a.type);
  const int64_t N = a.layout.outer;
  SX_CHECK(a.layout.V <= INT32_MAX, "at most 2^31 - 1 classes.");
  SX_CHECK(is(m, {N}, F) && is(rest, {N}, F), "m and rest hold one entry per row.");
  SX_CHECK(integers(except, a.except_kind) && except.dimensions().size() == 2, "except must hold int32 or int64.");
  SX_CHECK(u.dimensions().size() == 2, "u must have shape (N, K).");
  a.E = except.dimensions()[1], a.K = u.dimensions()[1];
  SX_CHECK(sizes(except, {N, a.E}) && is(u, {N, a.K}, DataType::F32), "except and u hold one line per row.");
  SX_CHECK(is(*ids, {N, a.K}, DataType::S32) && is(*mass, {N, 2}, F), "the results must be (N, K) int32 and (N, 2).");
  if (spans.size() > 0) {
    auto span = spans.get<AnyBuffer>(0);
    SX_CHECK(spans.size() == 1 && span.has_value() && is(*span, {N, 3, 2}, F), "span must have shape (N, 3, 2).");
    a.span = span->untyped_data();
  }
  SX_CHECK(scale > 0, "scale must be positive.");
  a.logits = logits.untyped_data(), a.m = m.untyped_data(), a.rest = rest.untyped_data();
  a.except = except.untyped_data(), a.u = (const float*)u.untyped_data();
  a.scale = scale, a.softcap = softcap > 0 ? softcap : 0;
  a.ids = (int32_t*)ids->untyped_data(), a.mass = mass->untyped_data();
  return run_all(pool, Fn::points, a);
}

// Sizes and types of what two of the three products take: c (N, C), a matrix, ids (N, K), and by and of_all or neither.
Error with_coefficients(const char* op, Picked& a, AnyBuffer& c, AnyBuffer& matrix, AnyBuffer& ids, int64_t rows,
                        ffi::RemainingArgs& more, AnyBuffer& out) {
  SX_CHECK(type_of(matrix.element_type(), a.type), "unsupported element type.");
  SX_CHECK(integers(ids, a.ids_kind) && ids.dimensions().size() == 2, "ids must hold int32 or int64, (N, K).");
  SX_CHECK(matrix.dimensions().size() == 2 && c.dimensions().size() == 2, "matrices must have 2 dimensions.");
  a.layout = {ids.dimensions()[0], matrix.dimensions()[1], 1};
  a.K = ids.dimensions()[1], a.C = c.dimensions()[1];
  DataType F = compute_type(a.type);
  SX_CHECK(is(c, {a.layout.outer, a.C}, F) && a.C <= a.K && (a.C > 0 || a.K == 0), "c must have 1 to K columns.");
  SX_CHECK(sizes(out, {rows, a.layout.V}), "the result has the wrong shape.");
  SX_CHECK(out.element_type() == F || out.element_type() == matrix.element_type(), "the result has the wrong type.");
  a.wide = out.element_type() == F;
  SX_CHECK(more.size() == 0 || more.size() == 2, "by needs of_all.");
  if (more.size() == 2) {
    auto by = more.get<AnyBuffer>(0), of_all = more.get<AnyBuffer>(1);
    SX_CHECK(by.has_value() && is(*by, {rows}, F), "by has the wrong shape or type.");
    SX_CHECK(of_all.has_value() && is(*of_all, {a.layout.V}, F), "of_all has the wrong shape or type.");
    a.by = by->untyped_data(), a.of_all = of_all->untyped_data();
  }
  a.c = c.untyped_data(), a.ids = ids.untyped_data();
  return Error::Success();
}

Error picked_fwd(ffi::ThreadPool pool, AnyBuffer x, AnyBuffer w, AnyBuffer ids, Out z) {
  const char* op = "picked_fwd";
  Picked a{};
  SX_CHECK(type_of(x.element_type(), a.type), "unsupported element type.");
  SX_CHECK(integers(ids, a.ids_kind) && ids.dimensions().size() == 2, "ids must hold int32 or int64, (N, K).");
  SX_CHECK(x.dimensions().size() == 2 && w.dimensions().size() == 2, "matrices must have 2 dimensions.");
  a.layout = {ids.dimensions()[0], x.dimensions()[1], 1};
  a.K = ids.dimensions()[1], a.V = w.dimensions()[0];
  SX_CHECK(sizes(x, {a.layout.outer, a.layout.V}) && is(w, {a.V, a.layout.V}, x.element_type()),
           "x and w must be (N, D) and (V, D) of one type.");
  SX_CHECK(is(*z, {a.layout.outer, a.K}, compute_type(a.type)), "the result must have the shape of ids.");
  a.x = x.untyped_data(), a.w = w.untyped_data(), a.ids = ids.untyped_data(), a.z = z->untyped_data();
  return a.layout.outer == 0 ? Error::Success() : run_units(pool, Fn::picked_fwd, a);
}

Error picked_input_bwd(ffi::ThreadPool pool, AnyBuffer c, AnyBuffer w, AnyBuffer ids, ffi::RemainingArgs outer,
                       Out dx) {
  Picked a{};
  int64_t rows = ids.dimensions().size() == 2 ? ids.dimensions()[0] : -1;
  Error error = with_coefficients("picked_input_bwd", a, c, w, ids, rows, outer, *dx);
  if (error.failure()) return error;
  a.V = w.dimensions()[0];
  a.w = w.untyped_data(), a.dx = fresh(dx);
  return a.layout.outer == 0 ? Error::Success() : run_units(pool, Fn::picked_input_bwd, a);
}

Error picked_weight_bwd(ffi::ThreadPool pool, AnyBuffer c, AnyBuffer x, AnyBuffer ids, ffi::RemainingArgs outer,
                        Out dw) {
  const char* op = "picked_weight_bwd";
  Picked a{};
  a.V = dw->dimensions().size() == 2 ? dw->dimensions()[0] : -1;
  Error error = with_coefficients(op, a, c, x, ids, a.V, outer, *dw);
  if (error.failure()) return error;
  SX_CHECK(sizes(x, {a.layout.outer, a.layout.V}), "x must have shape (N, D).");
  a.x = x.untyped_data(), a.dw = fresh(dw);
  Sorted sorted(a);
  while (sorted.next()) {
    error = run_units(pool, Fn::picked_weight_bwd, a);
    if (error.failure()) return error;
  }
  return Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_points, points,
                              row_binding()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<double>("scale")
                                  .Attr<double>("softcap"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    softmax_ext_picked_fwd, picked_fwd,
    row_binding().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    softmax_ext_picked_input_bwd, picked_input_bwd,
    row_binding().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().RemainingArgs().Ret<AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    softmax_ext_picked_weight_bwd, picked_weight_bwd,
    row_binding().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().RemainingArgs().Ret<AnyBuffer>());

#pragma GCC visibility pop

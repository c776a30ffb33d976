// The door's handlers of a student's and a teacher's rows.
#include "xla_door.h"

namespace {

using namespace softmax_ext;
using namespace softmax_ext::door;

#define SX_CHECK(condition, what) \
  if (!(condition)) return wrong(op, what)

// Fills in what every direction has; an empty message if all is right.
Error inputs(const char* op, Divergence& a, AnyBuffer student, AnyBuffer teacher, ffi::RemainingArgs more, int64_t axis,
             int64_t kind, double beta, double scale, double softcap, double teacher_scale, double teacher_softcap) {
  SX_CHECK(type_of(student.element_type(), a.type), "unsupported element type.");
  SX_CHECK(layout_of(student, axis, a.layout), "axis is out of range.");
  SX_CHECK(like(teacher, student), "teacher must be like student.");
  SX_CHECK(kind >= 0 && kind <= (int64_t)Kind::tv, "kind must lie in [0, 3].");
  SX_CHECK(beta > 0 && beta < 1, "beta must lie in (0, 1).");
  SX_CHECK(scale > 0 && teacher_scale > 0, "scales must be positive.");
  a.student = student.untyped_data();
  a.teacher = teacher.untyped_data();
  a.kind = (Kind)kind;
  a.beta = beta, a.scale = scale, a.teacher_scale = teacher_scale;
  a.softcap = softcap > 0 ? softcap : 0, a.teacher_softcap = teacher_softcap > 0 ? teacher_softcap : 0;
  SX_CHECK(more.size() <= 1, "too many buffers.");
  if (more.size() == 1) {
    auto keep = more.get<AnyBuffer>(0);
    SX_CHECK(keep.has_value() && keep->element_type() == DataType::PRED && rows_of(*keep, student, axis),
             "keep must hold booleans, one per row.");
    a.keep = (const uint8_t*)keep->untyped_data();
  }
  return Error::Success();
}

// Whether an array has `count` entries of each row of x, beside each other.
bool numbers_of(const AnyBuffer& array, const AnyBuffer& x, int64_t axis, Type type, int64_t count) {
  auto a = array.dimensions(), b = x.dimensions();
  bool same = array.element_type() == compute_type(type) && a.size() == b.size() && a.back() == count;
  for (int64_t i = 0; same && i + 1 < (int64_t)a.size(); ++i) same = a[i] == b[i < axis ? i : i + 1];
  return same;
}

Error divergence_fwd(ffi::ThreadPool pool, AnyBuffer student, AnyBuffer teacher, ffi::RemainingArgs more, Out value,
                     Out state, int64_t axis, int64_t kind, double beta, double scale, double softcap,
                     double teacher_scale, double teacher_softcap) {
  const char* op = "divergence_fwd";
  Divergence a{};
  Error error =
      inputs(op, a, student, teacher, more, axis, kind, beta, scale, softcap, teacher_scale, teacher_softcap);
  if (error.failure()) return error;
  SX_CHECK(rows_of(*value, student, axis, a.type), "value must have one entry per row, in the compute type.");
  SX_CHECK(numbers_of(*state, student, axis, a.type, row_state), "state must have its entries per row.");
  a.value = value->untyped_data(), a.state = state->untyped_data();
  return run_all(pool, Fn::divergence_fwd, a);
}

// Of a slice of the classes, from the whole rows' states.
Error divergence_sums(ffi::ThreadPool pool, AnyBuffer student, AnyBuffer teacher, AnyBuffer state,
                      ffi::RemainingArgs more, Out sums, int64_t axis, int64_t kind, double beta, double scale,
                      double softcap, double teacher_scale, double teacher_softcap) {
  const char* op = "divergence_sums";
  Divergence a{};
  Error error =
      inputs(op, a, student, teacher, more, axis, kind, beta, scale, softcap, teacher_scale, teacher_softcap);
  if (error.failure()) return error;
  SX_CHECK(numbers_of(state, student, axis, a.type, row_state), "state must have its entries per row.");
  SX_CHECK(numbers_of(*sums, student, axis, a.type, row_sums), "the result must have three entries per row.");
  a.state = state.untyped_data(), a.sums = sums->untyped_data();
  return run_all(pool, Fn::divergence_fwd, a);
}

Error divergence_bwd(ffi::ThreadPool pool, AnyBuffer student, AnyBuffer teacher, AnyBuffer state, AnyBuffer d_value,
                     ffi::RemainingArgs more, Out dstudent, int64_t axis, int64_t kind, double beta, double scale,
                     double softcap, double teacher_scale, double teacher_softcap) {
  const char* op = "divergence_bwd";
  Divergence a{};
  Error error =
      inputs(op, a, student, teacher, more, axis, kind, beta, scale, softcap, teacher_scale, teacher_softcap);
  if (error.failure()) return error;
  SX_CHECK(rows_of(d_value, student, axis, a.type), "d_value must have one entry per row, in the compute type.");
  SX_CHECK(numbers_of(state, student, axis, a.type, row_state), "state must have its entries per row.");
  SX_CHECK(like(*dstudent, student), "the result must be like student.");
  a.state = state.untyped_data(), a.d_value = d_value.untyped_data(), a.dstudent = fresh(dstudent);
  return run_all(pool, Fn::divergence_bwd, a);
}

// Over the student's logits: XLA gives both the same buffer, or has copied them.
Error divergence_fwd_bwd(ffi::ThreadPool pool, AnyBuffer student, AnyBuffer teacher, AnyBuffer d_value,
                         ffi::RemainingArgs more, Out dstudent, Out value, int64_t axis, int64_t kind, double beta,
                         double scale, double softcap, double teacher_scale, double teacher_softcap) {
  const char* op = "divergence_fwd_bwd";
  Divergence a{};
  Error error =
      inputs(op, a, student, teacher, more, axis, kind, beta, scale, softcap, teacher_scale, teacher_softcap);
  if (error.failure()) return error;
  SX_CHECK(rows_of(d_value, student, axis, a.type), "d_value must have one entry per row, in the compute type.");
  SX_CHECK(rows_of(*value, student, axis, a.type), "value must have one entry per row, in the compute type.");
  SX_CHECK(like(*dstudent, student), "the result must be like student.");
  a.d_value = d_value.untyped_data(), a.value = value->untyped_data(), a.dstudent = fresh(dstudent);
  return run_all(pool, Fn::divergence_fwd_bwd, a);
}

template <class Binding> auto with_options(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("axis")
      .template Attr<int64_t>("kind")
      .template Attr<double>("beta")
      .template Attr<double>("scale")
      .template Attr<double>("softcap")
      .template Attr<double>("teacher_scale")
      .template Attr<double>("teacher_softcap");
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    softmax_ext_divergence_fwd, divergence_fwd,
    with_options(row_binding().Arg<AnyBuffer>().Arg<AnyBuffer>().RemainingArgs().Ret<AnyBuffer>().Ret<AnyBuffer>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    softmax_ext_divergence_sums, divergence_sums,
    with_options(row_binding().Arg<AnyBuffer>().Arg<AnyBuffer>().Arg<AnyBuffer>().RemainingArgs().Ret<AnyBuffer>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_divergence_fwd_bwd, divergence_fwd_bwd,
                              with_options(row_binding()
                                               .Arg<AnyBuffer>()
                                               .Arg<AnyBuffer>()
                                               .Arg<AnyBuffer>()
                                               .RemainingArgs()
                                               .Ret<AnyBuffer>()
                                               .Ret<AnyBuffer>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_divergence_bwd, divergence_bwd,
                              with_options(row_binding()
                                               .Arg<AnyBuffer>()
                                               .Arg<AnyBuffer>()
                                               .Arg<AnyBuffer>()
                                               .Arg<AnyBuffer>()
                                               .RemainingArgs()
                                               .Ret<AnyBuffer>()));

#pragma GCC visibility pop

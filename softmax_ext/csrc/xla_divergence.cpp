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

bool state_of(const AnyBuffer& state, const AnyBuffer& value) {
  auto s = state.dimensions(), v = value.dimensions();
  bool same = state.element_type() == value.element_type() && s.size() == v.size() + 1;
  for (size_t i = 0; same && i < s.size(); ++i) same = s[i] == (i < v.size() ? v[i] : row_state);
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
  SX_CHECK(state_of(*state, *value), "state must have its entries per row, in the compute type.");
  a.value = value->untyped_data(), a.state = state->untyped_data();
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
  SX_CHECK(state_of(state, d_value), "state must have its entries per row, in the compute type.");
  SX_CHECK(like(*dstudent, student), "the result must be like student.");
  a.state = state.untyped_data(), a.d_value = d_value.untyped_data(), a.dstudent = fresh(dstudent);
  return run_all(pool, Fn::divergence_bwd, a);
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_divergence_bwd, divergence_bwd,
                              with_options(row_binding()
                                               .Arg<AnyBuffer>()
                                               .Arg<AnyBuffer>()
                                               .Arg<AnyBuffer>()
                                               .Arg<AnyBuffer>()
                                               .RemainingArgs()
                                               .Ret<AnyBuffer>()));

#pragma GCC visibility pop

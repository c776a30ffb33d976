// The door's ops of a student's and a teacher's rows.
#include "torch_door.h"

namespace {

using namespace softmax_ext;
using namespace softmax_ext::door;

struct Checked {
  Divergence a{};
  std::vector<Tensor> alive;
  const void* keep(const Tensor& x) {
    alive.push_back(dense(x));
    return alive.back().data_ptr();
  }
};

Checked check_inputs(const Tensor& student, const Tensor& teacher, const MaybeTensor& keep, int64_t dim, int64_t kind,
                     double beta, double scale, std::optional<double> softcap, double teacher_scale,
                     std::optional<double> teacher_softcap, const char* op) {
  Checked c;
  c.alive.reserve(5);
  c.a.layout = layout_of(student, dim, op);
  c.a.type = type_of(student, op, "student");
  check_like(teacher, student, op, "teacher");
  STD_TORCH_CHECK(kind >= 0 && kind <= (int64_t)Kind::tv, op, ": kind must lie in [0, 3].");
  STD_TORCH_CHECK(beta > 0 && beta < 1, op, ": beta must lie in (0, 1).");
  STD_TORCH_CHECK(scale > 0 && teacher_scale > 0, op, ": scales must be positive.");
  c.a.student = c.keep(student);
  c.a.teacher = c.keep(teacher);
  c.a.kind = (Kind)kind;
  c.a.beta = beta;
  c.a.scale = scale, c.a.teacher_scale = teacher_scale;
  c.a.softcap = softcap && *softcap > 0 ? *softcap : 0;
  c.a.teacher_softcap = teacher_softcap && *teacher_softcap > 0 ? *teacher_softcap : 0;
  if (keep) {
    check_rows(*keep, student, dim, ScalarType::Bool, op, "keep");
    c.a.keep = (const uint8_t*)c.keep(*keep);
  }
  return c;
}

Tensor add_value(Checked& c, const Tensor& student, int64_t dim) {
  Tensor value = new_rows(student, dim, compute_type(c.a.type));
  c.a.value = value.data_ptr();
  return value;
}

// A fresh tensor of some numbers of each row, beside each other.
Tensor new_numbers(const Tensor& student, int64_t dim, int64_t count, ScalarType type) {
  int64_t sizes[64], d = student.dim();
  for (int64_t i = 0; i + 1 < d; ++i) sizes[i] = student.size(i < dim ? i : i + 1);
  sizes[d - 1] = count;
  return new_of(d, sizes, dtype_of(type));
}

void add_upstream(Checked& c, const Tensor& student, const Tensor& d_value, int64_t dim, const char* op) {
  check_rows(d_value, student, dim, compute_type(c.a.type), op, "d_value");
  c.a.d_value = c.keep(d_value);
}

std::tuple<Tensor, Tensor> divergence_fwd(const Tensor& student, const Tensor& teacher, const MaybeTensor& keep,
                                          int64_t dim, int64_t kind, double beta, double scale,
                                          std::optional<double> softcap, double teacher_scale,
                                          std::optional<double> teacher_softcap) {
  Checked c = check_inputs(student, teacher, keep, dim, kind, beta, scale, softcap, teacher_scale, teacher_softcap,
                           "divergence_fwd");
  Tensor value = add_value(c, student, dim), state = new_numbers(student, dim, row_state, compute_type(c.a.type));
  c.a.state = state.data_ptr();
  run_all(Fn::divergence_fwd, c.a);
  return {value, state};
}

void add_state(Checked& c, const Tensor& student, const Tensor& state, int64_t dim, const char* op) {
  bool same = state.is_cpu() && state.dim() == student.dim() && state.scalar_type() == compute_type(c.a.type);
  for (int64_t i = 0, at = 0; same && i < state.dim(); ++i) {
    if (i == dim) ++at;
    same = state.size(i) == (i + 1 < state.dim() ? student.size(at++) : row_state);
  }
  STD_TORCH_CHECK(same, op, ": state must have ", row_state, " entries per row, in the right type.");
  // read only: the kernels write the state in the forward alone
  c.a.state = const_cast<void*>(c.keep(state));
}

Tensor divergence_sums(const Tensor& student, const Tensor& teacher, const MaybeTensor& keep, const Tensor& state,
                       int64_t dim, int64_t kind, double beta, double scale, std::optional<double> softcap,
                       double teacher_scale, std::optional<double> teacher_softcap) {
  const char* op = "divergence_sums";
  Checked c =
      check_inputs(student, teacher, keep, dim, kind, beta, scale, softcap, teacher_scale, teacher_softcap, op);
  add_state(c, student, state, dim, op);
  Tensor sums = new_numbers(student, dim, row_sums, compute_type(c.a.type));
  c.a.sums = sums.data_ptr();
  run_all(Fn::divergence_fwd, c.a);
  return sums;
}

Checked check_bwd(const Tensor& student, const Tensor& teacher, const MaybeTensor& keep, const Tensor& state,
                  const Tensor& d_value, int64_t dim, int64_t kind, double beta, double scale,
                  std::optional<double> softcap, double teacher_scale, std::optional<double> teacher_softcap,
                  const char* op) {
  Checked c =
      check_inputs(student, teacher, keep, dim, kind, beta, scale, softcap, teacher_scale, teacher_softcap, op);
  add_upstream(c, student, d_value, dim, op);
  add_state(c, student, state, dim, op);
  return c;
}

Tensor divergence_bwd(const Tensor& student, const Tensor& teacher, const MaybeTensor& keep, const Tensor& state,
                      const Tensor& d_value, int64_t dim, int64_t kind, double beta, double scale,
                      std::optional<double> softcap, double teacher_scale, std::optional<double> teacher_softcap) {
  Checked c = check_bwd(student, teacher, keep, state, d_value, dim, kind, beta, scale, softcap, teacher_scale,
                        teacher_softcap, "divergence_bwd");
  Tensor out = new_like(student);
  c.a.dstudent = out.data_ptr();
  run_all(Fn::divergence_bwd, c.a);
  return out;
}

void divergence_bwd_(const Tensor& student, const Tensor& teacher, const MaybeTensor& keep, const Tensor& state,
                     const Tensor& d_value, int64_t dim, int64_t kind, double beta, double scale,
                     std::optional<double> softcap, double teacher_scale, std::optional<double> teacher_softcap) {
  const char* op = "divergence_bwd_";
  STD_TORCH_CHECK(student.is_contiguous(), op, ": student must be contiguous to be overwritten.");
  Checked c = check_bwd(student, teacher, keep, state, d_value, dim, kind, beta, scale, softcap, teacher_scale,
                        teacher_softcap, op);
  c.a.dstudent = student.data_ptr();
  run_all(Fn::divergence_bwd, c.a);
}

Tensor divergence_fwd_bwd_(const Tensor& student, const Tensor& teacher, const MaybeTensor& keep,
                           const Tensor& d_value, int64_t dim, int64_t kind, double beta, double scale,
                           std::optional<double> softcap, double teacher_scale,
                           std::optional<double> teacher_softcap) {
  const char* op = "divergence_fwd_bwd_";
  STD_TORCH_CHECK(student.is_contiguous(), op, ": student must be contiguous to be overwritten.");
  Checked c =
      check_inputs(student, teacher, keep, dim, kind, beta, scale, softcap, teacher_scale, teacher_softcap, op);
  add_upstream(c, student, d_value, dim, op);
  Tensor value = add_value(c, student, dim);
  c.a.dstudent = student.data_ptr();
  run_all(Fn::divergence_fwd_bwd, c.a);
  return value;
}

}  // namespace

#define SX_PAIR "Tensor teacher, Tensor? keep"
#define SX_PAIR_OPTIONS                                                                                  \
  "int dim, int kind, float beta, float scale, float? softcap, float teacher_scale, float? teacher_softcap"

STABLE_TORCH_LIBRARY_FRAGMENT(softmax_ext, lib) {
  lib.def("divergence_fwd(Tensor student, " SX_PAIR ", " SX_PAIR_OPTIONS ") -> (Tensor, Tensor)");
  lib.def("divergence_sums(Tensor student, " SX_PAIR ", Tensor state, " SX_PAIR_OPTIONS ") -> Tensor");
  lib.def("divergence_bwd(Tensor student, " SX_PAIR ", Tensor state, Tensor d_value, " SX_PAIR_OPTIONS ") -> Tensor");
  lib.def("divergence_bwd_(Tensor(a!) student, " SX_PAIR ", Tensor state, Tensor d_value, " SX_PAIR_OPTIONS ") -> ()");
  lib.def("divergence_fwd_bwd_(Tensor(a!) student, " SX_PAIR ", Tensor d_value, " SX_PAIR_OPTIONS ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CPU, lib) {
  lib.impl("divergence_fwd", TORCH_BOX(&divergence_fwd));
  lib.impl("divergence_sums", TORCH_BOX(&divergence_sums));
  lib.impl("divergence_bwd", TORCH_BOX(&divergence_bwd));
  lib.impl("divergence_bwd_", TORCH_BOX(&divergence_bwd_));
  lib.impl("divergence_fwd_bwd_", TORCH_BOX(&divergence_fwd_bwd_));
}

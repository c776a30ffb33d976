// The short ways of the door for PyTorch: what no derivative needs, in one call. For a small array the calls cost more
// than the rows.
#include "torch_door.h"

namespace {

using namespace softmax_ext;
using namespace softmax_ext::door;

Tensor log_softmax_alone(const Tensor& x0, int64_t dim) {
  const char* op = "log_softmax_alone";
  Layout l = layout_of(x0, dim, op);
  Type type = type_of(x0, op, "x");
  Tensor x = dense(x0), out = new_like(x);
  std::vector<double> statistics(2 * l.rows());
  run_all(Fn::log_softmax_fwd, LogSoftmaxFwd{l, type, x.data_ptr(), out.data_ptr(), statistics.data(),
                                             statistics.data() + l.rows()});
  return out;
}

bool is_dense_cpu(const Tensor& x) {
  return x.is_cpu() && x.layout() == torch::headeronly::Layout::Strided;
}

// The mean over rows that all name a class: (loss), and with `keep` (loss, m, rest). Nothing where the call is any
// other: the caller then goes the ordinary way, which knows the rules and their sentences. Takes any two tensors.
std::vector<Tensor> cross_entropy_mean(const Tensor& logits0, const Tensor& target0, bool keep) {
  ScalarType given = logits0.scalar_type();
  bool floating = given == ScalarType::Float || given == ScalarType::Double || given == ScalarType::BFloat16 ||
                  given == ScalarType::Half;
  if (!floating || !is_dense_cpu(logits0) || !is_dense_cpu(target0) || logits0.dim() != 2 || target0.dim() != 1 ||
      target0.scalar_type() != ScalarType::Long)
    return {};
  int64_t N = logits0.size(0), V = logits0.size(1);
  if (N == 0 || N >= 1 << 24 || target0.size(0) != N) return {};  // from 2^24 on a float32 count is rounded
  Tensor logits = dense(logits0), target = dense(target0);
  const int64_t* t = static_cast<const int64_t*>(target.data_ptr());
  for (int64_t i = 0; i < N; ++i)
    if (t[i] < 0 || t[i] >= V) return {};

  Type type = type_of(logits, "cross_entropy_mean", "logits");
  auto new_row = [&] { return new_rows(logits, 1, compute_type(type)); };
  Tensor nll = new_row();
  std::vector<Tensor> out;
  CrossEntropy a{};
  a.layout = {N, V, 1};
  a.type = type;
  a.logits = logits.data_ptr();
  a.target = t;
  a.target_kind = Target::i64;
  a.scale = 1;
  a.nll = nll.data_ptr();
  if (keep) {
    out = {new_row(), new_row()};
    a.m = out[0].data_ptr();
    a.rest = out[1].data_ptr();
  }
  prepare(a);
  run_all(Fn::cross_entropy_fwd, a);
  Tensor loss = torch::stable::sum(nll);  // the framework's own: its order of additions is the ordinary way's
  if (type == Type::f64) *static_cast<double*>(loss.data_ptr()) /= double(N);
  else *static_cast<float*>(loss.data_ptr()) /= float(N);
  out.insert(out.begin(), loss);
  return out;
}

// d(logits) of that mean, where no derivative of it is wanted: no row of upstream gradients is made of the one number.
Tensor cross_entropy_mean_bwd(const Tensor& logits0, const Tensor& target0, const Tensor& m, const Tensor& rest,
                              const Tensor& d_loss) {
  const char* op = "cross_entropy_mean_bwd";
  Layout l = layout_of(logits0, 1, op);
  Type type = type_of(logits0, op, "logits");
  ScalarType kind = compute_type(type);
  STD_TORCH_CHECK(logits0.dim() == 2, op, ": logits must have two dimensions.");
  STD_TORCH_CHECK(target0.is_cpu() && target0.dim() == 1 && target0.size(0) == l.outer &&
                      target0.scalar_type() == ScalarType::Long,
                  op, ": target must have one int64 index per row.");
  check_rows(m, logits0, 1, kind, op, "m");
  check_rows(rest, logits0, 1, kind, op, "rest");
  STD_TORCH_CHECK(d_loss.is_cpu() && d_loss.dim() == 0 && d_loss.scalar_type() == kind, op,
                  ": d_loss must be one number, in the right type.");
  Tensor logits = dense(logits0), target = dense(target0), m1 = dense(m), rest1 = dense(rest), d = dense(d_loss);
  Tensor out = new_like(logits);
  std::vector<double> wide(type == Type::f64 ? l.outer : 0);
  std::vector<float> narrow(type == Type::f64 ? 0 : l.outer);
  if (type == Type::f64) wide.assign(l.outer, *static_cast<const double*>(d.data_ptr()) / double(l.outer));
  else narrow.assign(l.outer, *static_cast<const float*>(d.data_ptr()) / float(l.outer));
  CrossEntropy a{};
  a.layout = l;
  a.type = type;
  a.logits = logits.data_ptr();
  a.target = target.data_ptr();
  a.target_kind = Target::i64;
  a.scale = 1;
  a.m = m1.data_ptr();
  a.rest = rest1.data_ptr();
  a.d_nll = type == Type::f64 ? static_cast<const void*>(wide.data()) : narrow.data();
  a.dlogits = out.data_ptr();
  prepare(a);
  run_all(Fn::cross_entropy_bwd, a);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(softmax_ext, lib) {
  lib.def("log_softmax_alone(Tensor x, int dim) -> Tensor");
  lib.def("cross_entropy_mean(Tensor logits, Tensor target, bool keep) -> Tensor[]");
  lib.def("cross_entropy_mean_bwd(Tensor logits, Tensor target, Tensor m, Tensor rest, Tensor d_loss) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CPU, lib) {
  lib.impl("log_softmax_alone", TORCH_BOX(&log_softmax_alone));
  lib.impl("cross_entropy_mean_bwd", TORCH_BOX(&cross_entropy_mean_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CompositeExplicitAutograd, lib) {
  lib.impl("cross_entropy_mean", TORCH_BOX(&cross_entropy_mean));
}

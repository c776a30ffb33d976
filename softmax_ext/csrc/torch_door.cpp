// The door for PyTorch: LibTorch's stable ABI only, so that one build serves every Python and every torch from
// TORCH_TARGET_VERSION on. Checks what the kernels rely on, allocates, and hands units to torch's own threads.
#include "torch_door.h"

namespace {

using namespace softmax_ext;
using namespace softmax_ext::door;

Tensor softmax_fwd(const Tensor& x0, int64_t dim) {
  const char* op = "softmax_fwd";
  Layout y = layout_of(x0, dim, op);
  Type type = type_of(x0, op, "x");
  Tensor x = dense(x0), out = new_like(x);
  run_all(Fn::softmax_fwd, SoftmaxFwd{y, type, x.data_ptr(), out.data_ptr()});
  return out;
}

Tensor softmax_bwd(const Tensor& dy0, const Tensor& y0, int64_t dim) {
  const char* op = "softmax_bwd";
  Layout l = layout_of(y0, dim, op);
  Type type = type_of(y0, op, "y");
  check_like(dy0, y0, op, "dy");
  Tensor dy = dense(dy0), y = dense(y0), out = new_like(y);
  run_all(Fn::softmax_bwd, SoftmaxBwd{l, type, dy.data_ptr(), y.data_ptr(), out.data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> log_softmax_fwd(const Tensor& x0, int64_t dim) {
  const char* op = "log_softmax_fwd";
  Layout l = layout_of(x0, dim, op);
  Type type = type_of(x0, op, "x");
  Tensor x = dense(x0), out = new_like(x);
  Tensor m = new_rows(x, dim, compute_type(type)), rest = new_rows(x, dim, compute_type(type));
  run_all(Fn::log_softmax_fwd,
          LogSoftmaxFwd{l, type, x.data_ptr(), out.data_ptr(), m.data_ptr(), rest.data_ptr()});
  return {out, m, rest};
}

Tensor log_softmax_bwd(const Tensor& dy0, const Tensor& x0, const Tensor& m0, const Tensor& rest0, int64_t dim) {
  const char* op = "log_softmax_bwd";
  Layout l = layout_of(x0, dim, op);
  Type type = type_of(x0, op, "x");
  check_like(dy0, x0, op, "dy");
  check_rows(m0, x0, dim, compute_type(type), op, "m");
  check_rows(rest0, x0, dim, compute_type(type), op, "rest");
  Tensor dy = dense(dy0), x = dense(x0), m = dense(m0), rest = dense(rest0), out = new_like(x);
  run_all(Fn::log_softmax_bwd,
          LogSoftmaxBwd{l, type, dy.data_ptr(), x.data_ptr(), m.data_ptr(), rest.data_ptr(), out.data_ptr()});
  return out;
}

// One call's checked arguments, kept alive beside the raw pointers.
struct Checked {
  CrossEntropy a{};
  std::vector<Tensor> alive;
  const void* keep(const Tensor& x) {
    alive.push_back(dense(x));
    return alive.back().data_ptr();
  }
  // K a row, along the classes' dimension
  void classes(const Tensor& x, const Tensor& logits, int64_t dim, ScalarType type, const char* op, const char* name) {
    bool same = x.is_cpu() && x.dim() == logits.dim() && x.scalar_type() == type;
    for (int64_t i = 0; same && i < logits.dim(); ++i)
      same = i == dim ? !a.ids || x.size(i) == a.K : x.size(i) == logits.size(i);
    STD_TORCH_CHECK(same, op, ": ", name, " must have K entries per row, in the right type.");
  }
};

Checked check_inputs(const Tensor& logits, const Tensor& target, const MaybeTensor& weight, int64_t dim, double scale,
                     std::optional<double> softcap, const char* op) {
  Checked c;
  c.alive.reserve(10);
  c.a.layout = layout_of(logits, dim, op);
  c.a.type = type_of(logits, op, "logits");
  ScalarType F = compute_type(c.a.type), t = target.scalar_type();
  Target integers = t == ScalarType::Long ? Target::i64 : Target::i32;
  if ((t == ScalarType::Long || t == ScalarType::Int) && target.dim() == logits.dim()) {
    c.classes(target, logits, dim, t, op, "target");
    c.a.ids_kind = integers;
    c.a.K = target.size(dim);
    c.a.ids = c.keep(target);
    if (!c.a.ids) c.a.ids = &c.a.K;  // no ids at all: not read, but not absent
  } else if (t == ScalarType::Long || t == ScalarType::Int) {
    check_rows(target, logits, dim, t, op, "target");
    c.a.target_kind = integers;
  } else {
    bool same = target.is_cpu() && target.dim() == logits.dim() && (t == F || t == logits.scalar_type());
    for (int64_t i = 0; same && i < logits.dim(); ++i) same = target.size(i) == logits.size(i);
    STD_TORCH_CHECK(same, op, ": target must hold integers, one per row, or have the logits' shape and type.");
    c.a.target_kind = t == F ? Target::dense_compute_type : Target::dense_logits_type;
  }
  c.a.logits = c.keep(logits);
  if (!c.a.ids) c.a.target = c.keep(target);
  if (weight) {
    STD_TORCH_CHECK(weight->is_cpu() && weight->dim() == 1 && weight->size(0) == c.a.layout.V &&
                        weight->scalar_type() == F,
                    op, ": weight must have shape (V,) and the compute type.");
    c.a.weight = c.keep(*weight);
  }
  STD_TORCH_CHECK(scale > 0, op, ": scale must be positive.");
  c.a.scale = scale;
  c.a.softcap = softcap && *softcap > 0 ? *softcap : 0;
  prepare(c.a);
  return c;
}

std::vector<Tensor> add_results(Checked& c, const Tensor& logits, const Tensor& target, int64_t dim, bool smooth,
                                bool entropy) {
  ScalarType F = compute_type(c.a.type);
  std::vector<Tensor> out;
  out.reserve(6);
  auto next = [&] {
    out.push_back(new_rows(logits, dim, F));
    return out.back().data_ptr();
  };
  if (c.a.ids) {
    int64_t sizes[64];
    for (int64_t i = 0; i < target.dim(); ++i) sizes[i] = target.size(i);
    out.push_back(new_of(target.dim(), sizes, dtype_of(F)));
    c.a.nll = out.back().data_ptr();
  } else {
    c.a.nll = next();
  }
  c.a.lse = next();
  if (smooth) c.a.smooth = next();
  if (entropy) c.a.entropy = next();
  c.a.m = next();
  c.a.rest = next();
  return out;
}

void add_upstream(Checked& c, const Tensor& logits, int64_t dim, const MaybeTensor& d_nll, const MaybeTensor& d_lse,
                  const MaybeTensor& d_smooth, const MaybeTensor& d_entropy, const char* op) {
  auto one = [&](const MaybeTensor& d, const char* name) -> const void* {
    if (!d) return nullptr;
    check_rows(*d, logits, dim, compute_type(c.a.type), op, name);
    return c.keep(*d);
  };
  if (c.a.ids && d_nll) {
    c.classes(*d_nll, logits, dim, compute_type(c.a.type), op, "d_nll");
    c.a.d_nll = c.keep(*d_nll);
  } else {
    c.a.d_nll = one(d_nll, "d_nll");
  }
  c.a.d_lse = one(d_lse, "d_lse");
  c.a.d_smooth = one(d_smooth, "d_smooth");
  c.a.d_entropy = one(d_entropy, "d_entropy");
}

void* in_place(const Tensor& logits, const char* op) {
  STD_TORCH_CHECK(logits.is_contiguous(), op, ": logits must be contiguous to be overwritten.");
  return logits.data_ptr();
}

std::vector<Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                                      int64_t dim, double scale, std::optional<double> softcap, bool smooth,
                                      bool entropy) {
  Checked c = check_inputs(logits, target, weight, dim, scale, softcap, "cross_entropy_fwd");
  std::vector<Tensor> out = add_results(c, logits, target, dim, smooth, entropy);
  run_all(Fn::cross_entropy_fwd, c.a);
  return out;
}

Checked backward(const char* op, const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                 const Tensor& m, const Tensor& rest, const MaybeTensor& d_nll, const MaybeTensor& d_lse,
                 const MaybeTensor& d_smooth, const MaybeTensor& d_entropy, int64_t dim, double scale,
                 std::optional<double> softcap) {
  Checked c = check_inputs(logits, target, weight, dim, scale, softcap, op);
  ScalarType F = compute_type(c.a.type);
  check_rows(m, logits, dim, F, op, "m");
  check_rows(rest, logits, dim, F, op, "rest");
  // read only: the kernels write m and rest in the forward alone
  c.a.m = const_cast<void*>(c.keep(m));
  c.a.rest = const_cast<void*>(c.keep(rest));
  add_upstream(c, logits, dim, d_nll, d_lse, d_smooth, d_entropy, op);
  return c;
}

Tensor cross_entropy_bwd(const Tensor& logits, const Tensor& target, const MaybeTensor& weight, const Tensor& m,
                         const Tensor& rest, const MaybeTensor& d_nll, const MaybeTensor& d_lse,
                         const MaybeTensor& d_smooth, const MaybeTensor& d_entropy, int64_t dim, double scale,
                         std::optional<double> softcap) {
  Checked c = backward("cross_entropy_bwd", logits, target, weight, m, rest, d_nll, d_lse, d_smooth, d_entropy, dim,
                       scale, softcap);
  Tensor out = new_like(logits);
  c.a.dlogits = out.data_ptr();
  run_all(Fn::cross_entropy_bwd, c.a);
  return out;
}

void cross_entropy_bwd_(const Tensor& logits, const Tensor& target, const MaybeTensor& weight, const Tensor& m,
                        const Tensor& rest, const MaybeTensor& d_nll, const MaybeTensor& d_lse,
                        const MaybeTensor& d_smooth, const MaybeTensor& d_entropy, int64_t dim, double scale,
                        std::optional<double> softcap) {
  const char* op = "cross_entropy_bwd_";
  void* out = in_place(logits, op);
  Checked c = backward(op, logits, target, weight, m, rest, d_nll, d_lse, d_smooth, d_entropy, dim, scale, softcap);
  c.a.dlogits = out;
  run_all(Fn::cross_entropy_bwd, c.a);
}

std::vector<Tensor> cross_entropy_fwd_bwd_(const Tensor& logits, const Tensor& target, const MaybeTensor& weight,
                                           const MaybeTensor& d_nll, const MaybeTensor& d_lse,
                                           const MaybeTensor& d_smooth, const MaybeTensor& d_entropy, int64_t dim,
                                           double scale, std::optional<double> softcap, bool smooth, bool entropy) {
  const char* op = "cross_entropy_fwd_bwd_";
  void* dlogits = in_place(logits, op);
  Checked c = check_inputs(logits, target, weight, dim, scale, softcap, op);
  add_upstream(c, logits, dim, d_nll, d_lse, d_smooth, d_entropy, op);
  std::vector<Tensor> out = add_results(c, logits, target, dim, smooth, entropy);
  c.a.dlogits = dlogits;
  run_all(Fn::cross_entropy_fwd_bwd, c.a);
  return out;
}

}  // namespace

#define SX_ROW_OPTIONS "int dim, float scale, float? softcap"
#define SX_UPSTREAM "Tensor? d_nll, Tensor? d_lse, Tensor? d_smooth, Tensor? d_entropy"

STABLE_TORCH_LIBRARY(softmax_ext, lib) {
  lib.def("softmax_fwd(Tensor x, int dim) -> Tensor");
  lib.def("softmax_bwd(Tensor dy, Tensor y, int dim) -> Tensor");
  lib.def("log_softmax_fwd(Tensor x, int dim) -> (Tensor, Tensor, Tensor)");
  lib.def("log_softmax_bwd(Tensor dy, Tensor x, Tensor m, Tensor rest, int dim) -> Tensor");
  lib.def("cross_entropy_fwd(Tensor logits, Tensor target, Tensor? weight, " SX_ROW_OPTIONS
          ", bool smooth, bool entropy) -> Tensor[]");
  lib.def("cross_entropy_bwd(Tensor logits, Tensor target, Tensor? weight, Tensor m, Tensor rest, " SX_UPSTREAM
          ", " SX_ROW_OPTIONS ") -> Tensor");
  lib.def("cross_entropy_bwd_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor m, Tensor rest, " SX_UPSTREAM
          ", " SX_ROW_OPTIONS ") -> ()");
  lib.def("cross_entropy_fwd_bwd_(Tensor(a!) logits, Tensor target, Tensor? weight, " SX_UPSTREAM ", " SX_ROW_OPTIONS
          ", bool smooth, bool entropy) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(softmax_ext, CPU, lib) {
  lib.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  lib.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
  lib.impl("log_softmax_fwd", TORCH_BOX(&log_softmax_fwd));
  lib.impl("log_softmax_bwd", TORCH_BOX(&log_softmax_bwd));
  lib.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  lib.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
  lib.impl("cross_entropy_bwd_", TORCH_BOX(&cross_entropy_bwd_));
  lib.impl("cross_entropy_fwd_bwd_", TORCH_BOX(&cross_entropy_fwd_bwd_));
}

// Read by Python through ctypes: which kernels ran, and the tests' way to lower them.
extern "C" __attribute__((visibility("default"))) const char* softmax_ext_instruction_set() {
  return instruction_set_name();
}
extern "C" __attribute__((visibility("default"))) int softmax_ext_limit_instruction_set(int level) {
  return limit_instruction_set(level);
}
extern "C" __attribute__((visibility("default"))) int64_t softmax_ext_judge_huge_pages(int64_t bytes, int64_t nanoseconds) {
  return judge_huge_pages(bytes, nanoseconds);
}

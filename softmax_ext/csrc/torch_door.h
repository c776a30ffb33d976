// What the ops of the door for PyTorch share: checks, allocation, threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <optional>
#include <vector>

#include "huge_pages.h"
#include "rows.h"

namespace softmax_ext::door {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const Tensor& x, const char* op, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16.");
  }
}
inline ScalarType compute_type(Type t) { return t == Type::f64 ? ScalarType::Double : ScalarType::Float; }

inline Layout layout_of(const Tensor& x, int64_t dim, const char* op) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": the native kernels serve CPU tensors.");
  int64_t d = x.dim();
  STD_TORCH_CHECK(dim >= 0 && dim < d, op, ": dim must lie in [0, ", d, "); got ", dim, ".");
  STD_TORCH_CHECK(x.size(dim) > 0, op, ": the native kernels need at least one class.");
  Layout y{1, x.size(dim), 1};
  for (int64_t i = 0; i < dim; ++i) y.outer *= x.size(i);
  for (int64_t i = dim + 1; i < d; ++i) y.inner *= x.size(i);
  return y;
}

// The built-ins take any strides; an upstream gradient is often expanded, with stride 0.
inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline void check_like(const Tensor& x, const Tensor& like, const char* op, const char* name) {
  bool same = x.is_cpu() && x.dim() == like.dim() && x.scalar_type() == like.scalar_type();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = x.size(i) == like.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape, type and device of the first argument.");
}

inline void check_rows(const Tensor& x, const Tensor& of, int64_t dim, ScalarType type, const char* op, const char* name) {
  bool same = x.is_cpu() && x.dim() == of.dim() - 1 && x.scalar_type() == type;
  for (int64_t i = 0; same && i < of.dim() - 1; ++i) same = x.size(i) == of.size(i < dim ? i : i + 1);
  STD_TORCH_CHECK(same, op, ": ", name, " must have one entry per row, in the right type.");
}

// A fresh contiguous tensor.
inline Tensor new_of(int64_t d, const int64_t* sizes, int32_t dtype) {
  int64_t strides[64], s = 1;
  for (int64_t i = d - 1; i >= 0; --i) strides[i] = s, s *= sizes[i] > 0 ? sizes[i] : 1;
  AtenTensorHandle h;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(d, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &h));
  return Tensor(h);
}
inline int32_t dtype_of(ScalarType type) {
  return type == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline Tensor new_rows(const Tensor& of, int64_t dim, ScalarType type) {
  int64_t sizes[64], d = of.dim();
  STD_TORCH_CHECK(d <= 64, "softmax_ext: at most 64 dimensions.");
  for (int64_t i = 0; i < d - 1; ++i) sizes[i] = of.size(i < dim ? i : i + 1);
  return new_of(d - 1, sizes, dtype_of(type));
}

inline Tensor new_like(const Tensor& x) {  // contiguous, whatever the strides of x
  int64_t sizes[64], count = 1, d = x.dim();
  STD_TORCH_CHECK(d <= 64, "softmax_ext: at most 64 dimensions.");
  for (int64_t i = 0; i < d; ++i) sizes[i] = x.size(i), count *= sizes[i];
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  Tensor y = new_of(d, sizes, dtype);
  advise_huge_pages(y.data_ptr(), count * (int64_t)x.element_size());
  return y;
}

template <class Args> void run_units(Fn fn, const Args& args) {
  Plan p = plan(args);
  std::atomic<bool> ok{true};
  Writing writing(args);
  auto part = [&](int64_t begin, int64_t end) {
    if (!writing.run(fn, &args, begin, end)) ok = false;
  };
  if (p.units <= p.grain) part(0, p.units);
  else torch::stable::parallel_for(0, p.units, p.grain, part);
  STD_TORCH_CHECK(ok, "softmax_ext: out of memory for scratch space.");
}
template <class Args> void run_all(Fn fn, const Args& args) {
  if (args.layout.rows() > 0) run_units(fn, args);
}

}  // namespace softmax_ext::door

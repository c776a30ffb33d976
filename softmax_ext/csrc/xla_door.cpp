// The door for XLA, so for JAX: header-only FFI, nothing linked. Checks every buffer it reads or writes, takes the
// layout from the buffers and the `axis` attribute, and hands units to XLA's own threads.
//
// Arguments and results that may be absent come in a fixed order, those present named by boolean attributes.
#include "xla_door.h"

namespace {

using namespace softmax_ext;
using namespace softmax_ext::door;

#define SX_HEAD(op, first)                                                                      \
  Type type;                                                                                    \
  Layout layout;                                                                                \
  if (!type_of((first).element_type(), type)) return wrong(op, "unsupported element type.");    \
  if (!layout_of(first, axis, layout)) return wrong(op, "axis is out of range.")
#define SX_CHECK(op, condition, what) \
  if (!(condition)) return wrong(op, what)

Error softmax_fwd(ffi::ThreadPool pool, AnyBuffer x, Out y, int64_t axis) {
  SX_HEAD("softmax_fwd", x);
  SX_CHECK("softmax_fwd", like(*y, x), "the result must be like x.");
  return run_all(pool, Fn::softmax_fwd, SoftmaxFwd{layout, type, x.untyped_data(), fresh(y)});
}

Error softmax_bwd(ffi::ThreadPool pool, AnyBuffer dy, AnyBuffer y, Out dx, int64_t axis) {
  SX_HEAD("softmax_bwd", y);
  SX_CHECK("softmax_bwd", like(dy, y) && like(*dx, y), "dy, y and the result must be alike.");
  return run_all(pool, Fn::softmax_bwd, SoftmaxBwd{layout, type, dy.untyped_data(), y.untyped_data(), fresh(dx)});
}

Error log_softmax_fwd(ffi::ThreadPool pool, AnyBuffer x, Out y, Out m, Out rest, int64_t axis) {
  SX_HEAD("log_softmax_fwd", x);
  SX_CHECK("log_softmax_fwd", like(*y, x) && rows_of(*m, x, axis, type) && rows_of(*rest, x, axis, type),
           "the results must be like x, and two with one entry per row.");
  return run_all(pool, Fn::log_softmax_fwd,
                 LogSoftmaxFwd{layout, type, x.untyped_data(), fresh(y), m->untyped_data(), rest->untyped_data()});
}

Error log_softmax_bwd(ffi::ThreadPool pool, AnyBuffer dy, AnyBuffer x, AnyBuffer m, AnyBuffer rest, Out dx,
                      int64_t axis) {
  SX_HEAD("log_softmax_bwd", x);
  SX_CHECK("log_softmax_bwd",
           like(dy, x) && like(*dx, x) && rows_of(m, x, axis, type) && rows_of(rest, x, axis, type),
           "dy, x and the result must be alike, m and rest hold one entry per row.");
  return run_all(pool, Fn::log_softmax_bwd,
                 LogSoftmaxBwd{layout, type, dy.untyped_data(), x.untyped_data(), m.untyped_data(),
                               rest.untyped_data(), fresh(dx)});
}

// Walks the arguments or results that follow the fixed ones.
template <class Remaining> struct Next {
  const char* op;
  Remaining all;
  size_t i = 0;
  std::string error;
  bool take(bool wanted, AnyBuffer& out) {
    if (!wanted) return false;
    if (i >= all.size()) {
      error = "too few buffers.";
      return false;
    }
    auto got = all.template get<AnyBuffer>(i++);
    if (!got.has_value()) {
      error = "a buffer could not be read.";
      return false;
    }
    if constexpr (std::is_same_v<Remaining, ffi::RemainingRets>) out = **got;
    else out = *got;
    return true;
  }
};

struct CeCall {
  CrossEntropy a{};
  std::string error;

  void inputs(AnyBuffer logits, AnyBuffer target, int64_t axis, double scale, double softcap) {
    if (!type_of(logits.element_type(), a.type)) return void(error = "unsupported element type.");
    if (!layout_of(logits, axis, a.layout)) return void(error = "axis is out of range.");
    DataType t = target.element_type();
    const bool integers = t == DataType::S64 || t == DataType::S32;
    const Target kind = t == DataType::S64 ? Target::i64 : Target::i32;
    if (integers && classes_of(target, logits, axis)) {
      a.ids_kind = kind;
      a.K = target.dimensions()[axis];
      a.ids = target.untyped_data();
      if (!a.ids) a.ids = &a.K;  // no ids at all: not read, but not absent
    } else if (integers && rows_of(target, logits, axis))
      a.target_kind = kind;
    else if (t == compute_type(a.type) && same_shape(target, logits))
      a.target_kind = Target::dense_compute_type;
    else if (like(target, logits))
      a.target_kind = Target::dense_logits_type;
    else
      return void(error = "target must hold int32 or int64, one or K per row, or have the logits' shape and type.");
    if (!(scale > 0)) return void(error = "scale must be positive.");
    a.logits = logits.untyped_data();
    a.target = target.untyped_data();
    a.scale = scale;
    a.softcap = softcap > 0 ? softcap : 0;
  }
  template <class R> const void* weight(Next<R>& next, bool wanted) {
    AnyBuffer b(nullptr_buffer());
    if (!error.empty() || !next.take(wanted, b)) return nullptr;
    if (b.element_type() != compute_type(a.type) || b.dimensions().size() != 1 || b.dimensions()[0] != a.layout.V) {
      error = "weight must have shape (V,) and the compute type.";
      return nullptr;
    }
    return b.untyped_data();
  }
  template <class R> void* row(Next<R>& next, bool wanted, const AnyBuffer& logits, int64_t axis) {
    AnyBuffer b(nullptr_buffer());
    if (!error.empty() || !next.take(wanted, b)) return nullptr;
    if (!rows_of(b, logits, axis, a.type)) {
      error = "a row-shaped buffer must have one entry per row, in the compute type.";
      return nullptr;
    }
    return b.untyped_data();
  }
  // nll and its gradient: as the target, one or K per row
  template <class R> void* own(Next<R>& next, bool wanted, const AnyBuffer& logits, int64_t axis) {
    if (!a.ids) return row(next, wanted, logits, axis);
    AnyBuffer b(nullptr_buffer());
    if (!error.empty() || !next.take(wanted, b)) return nullptr;
    if (b.element_type() != compute_type(a.type) || !classes_of(b, logits, axis) || b.dimensions()[axis] != a.K) {
      error = "nll and its gradient must have the target's shape, in the compute type.";
      return nullptr;
    }
    return b.untyped_data();
  }
  void* gradient(Next<ffi::RemainingRets>& next, const AnyBuffer& logits) {
    AnyBuffer b(nullptr_buffer());
    if (!error.empty() || !next.take(true, b)) return nullptr;
    if (!like(b, logits)) {
      error = "dlogits must be like the logits.";
      return nullptr;
    }
    if (b.untyped_data() != logits.untyped_data()) advise_huge_pages(b.untyped_data(), (int64_t)b.size_bytes());
    return b.untyped_data();
  }
  template <class A, class R> Error finish(const char* op, ffi::ThreadPool& pool, Fn fn, const A& args, const R& rets) {
    if (error.empty()) error = args.error;
    if (error.empty()) error = rets.error;
    if (error.empty() && (args.i != args.all.size() || rets.i != rets.all.size())) error = "too many buffers.";
    if (!error.empty()) return wrong(op, error);
    prepare(a);
    return run_all(pool, fn, a);
  }
  static const XLA_FFI_Buffer* nullptr_buffer() {
    static const XLA_FFI_Buffer none{};
    return &none;
  }
};

Error cross_entropy_fwd(ffi::ThreadPool pool, AnyBuffer logits, AnyBuffer target, ffi::RemainingArgs args,
                        ffi::RemainingRets rets, int64_t axis, double scale, double softcap, bool weight, bool smooth,
                        bool entropy) {
  CeCall c;
  c.inputs(logits, target, axis, scale, softcap);
  Next<ffi::RemainingArgs> in{"cross_entropy_fwd", args, 0, {}};
  Next<ffi::RemainingRets> out{"cross_entropy_fwd", rets, 0, {}};
  c.a.weight = c.weight(in, weight);
  c.a.nll = c.own(out, true, logits, axis);
  c.a.lse = c.row(out, true, logits, axis);
  c.a.smooth = c.row(out, smooth, logits, axis);
  c.a.entropy = c.row(out, entropy, logits, axis);
  c.a.m = c.row(out, true, logits, axis);
  c.a.rest = c.row(out, true, logits, axis);
  return c.finish("cross_entropy_fwd", pool, Fn::cross_entropy_fwd, in, out);
}

Error cross_entropy_bwd(ffi::ThreadPool pool, AnyBuffer logits, AnyBuffer target, ffi::RemainingArgs args,
                        ffi::RemainingRets rets, int64_t axis, double scale, double softcap, bool weight, bool d_nll,
                        bool d_lse, bool d_smooth, bool d_entropy) {
  CeCall c;
  c.inputs(logits, target, axis, scale, softcap);
  Next<ffi::RemainingArgs> in{"cross_entropy_bwd", args, 0, {}};
  Next<ffi::RemainingRets> out{"cross_entropy_bwd", rets, 0, {}};
  c.a.weight = c.weight(in, weight);
  c.a.m = c.row(in, true, logits, axis);
  c.a.rest = c.row(in, true, logits, axis);
  c.a.d_nll = c.own(in, d_nll, logits, axis);
  c.a.d_lse = c.row(in, d_lse, logits, axis);
  c.a.d_smooth = c.row(in, d_smooth, logits, axis);
  c.a.d_entropy = c.row(in, d_entropy, logits, axis);
  c.a.dlogits = c.gradient(out, logits);
  return c.finish("cross_entropy_bwd", pool, Fn::cross_entropy_bwd, in, out);
}

Error cross_entropy_fwd_bwd(ffi::ThreadPool pool, AnyBuffer logits, AnyBuffer target, ffi::RemainingArgs args,
                            ffi::RemainingRets rets, int64_t axis, double scale, double softcap, bool weight,
                            bool d_nll, bool d_lse, bool d_smooth, bool d_entropy, bool smooth, bool entropy) {
  CeCall c;
  c.inputs(logits, target, axis, scale, softcap);
  Next<ffi::RemainingArgs> in{"cross_entropy_fwd_bwd", args, 0, {}};
  Next<ffi::RemainingRets> out{"cross_entropy_fwd_bwd", rets, 0, {}};
  c.a.weight = c.weight(in, weight);
  c.a.d_nll = c.own(in, d_nll, logits, axis);
  c.a.d_lse = c.row(in, d_lse, logits, axis);
  c.a.d_smooth = c.row(in, d_smooth, logits, axis);
  c.a.d_entropy = c.row(in, d_entropy, logits, axis);
  c.a.dlogits = c.gradient(out, logits);
  c.a.nll = c.own(out, true, logits, axis);
  c.a.lse = c.row(out, true, logits, axis);
  c.a.smooth = c.row(out, smooth, logits, axis);
  c.a.entropy = c.row(out, entropy, logits, axis);
  c.a.m = c.row(out, true, logits, axis);
  c.a.rest = c.row(out, true, logits, axis);
  return c.finish("cross_entropy_fwd_bwd", pool, Fn::cross_entropy_fwd_bwd, in, out);
}

auto cross_entropy_binding() {
  return row_binding()
      .Arg<AnyBuffer>()
      .Arg<AnyBuffer>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("axis")
      .Attr<double>("scale")
      .Attr<double>("softcap")
      .Attr<bool>("weight");
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_softmax_fwd, softmax_fwd,
                              row_binding().Arg<AnyBuffer>().Ret<AnyBuffer>().Attr<int64_t>("axis"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    softmax_ext_softmax_bwd, softmax_bwd,
    row_binding().Arg<AnyBuffer>().Arg<AnyBuffer>().Ret<AnyBuffer>().Attr<int64_t>("axis"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    softmax_ext_log_softmax_fwd, log_softmax_fwd,
    row_binding().Arg<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Ret<AnyBuffer>().Attr<int64_t>("axis"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_log_softmax_bwd, log_softmax_bwd,
                              row_binding()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<int64_t>("axis"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_cross_entropy_fwd, cross_entropy_fwd,
                              cross_entropy_binding().Attr<bool>("smooth").Attr<bool>("entropy"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_cross_entropy_bwd, cross_entropy_bwd,
                              cross_entropy_binding()
                                  .Attr<bool>("d_nll")
                                  .Attr<bool>("d_lse")
                                  .Attr<bool>("d_smooth")
                                  .Attr<bool>("d_entropy"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(softmax_ext_cross_entropy_fwd_bwd, cross_entropy_fwd_bwd,
                              cross_entropy_binding()
                                  .Attr<bool>("d_nll")
                                  .Attr<bool>("d_lse")
                                  .Attr<bool>("d_smooth")
                                  .Attr<bool>("d_entropy")
                                  .Attr<bool>("smooth")
                                  .Attr<bool>("entropy"));

extern "C" {
// The FFI version baked in. It must not exceed the runtime's: registering such a handler would keep the whole CPU
// backend from starting, so Python compares before it registers.
int softmax_ext_ffi_major() { return XLA_FFI_API_MAJOR; }
int softmax_ext_ffi_minor() { return XLA_FFI_API_MINOR; }
const char* softmax_ext_instruction_set() { return instruction_set_name(); }
int softmax_ext_limit_instruction_set(int level) { return limit_instruction_set(level); }
}
#pragma GCC visibility pop

// The door for XLA, so for JAX: header-only FFI, nothing linked. Checks every buffer it reads or writes, takes the
// layout from the buffers and the `axis` attribute, and hands units to XLA's own threads.
//
// Arguments and results that may be absent come in a fixed order, those present named by boolean attributes.
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace softmax_ext;
namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using ffi::Error;
using Out = ffi::Result<AnyBuffer>;

Error wrong(const char* op, const std::string& what) {
  return Error::InvalidArgument(std::string("softmax_ext_") + op + ": " + what);
}

// Work shared with the pool. Only a claimed chunk is waited for: a task that never starts (all of the pool's threads
// may be inside handlers like this one) claims nothing, and one that starts late finds nothing left.
struct Shared {
  std::atomic<int64_t> next{0};
  std::atomic<bool> ok{true};
  int64_t units, chunk, chunks, done = 0;
  Fn fn;
  const void* args;  // lives in the caller, who returns only after the last chunk
  std::mutex mutex;
  std::condition_variable finished;

  void work() {
    int64_t mine = 0;
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks; ++mine) {
      int64_t begin = c * chunk, end = begin + chunk < units ? begin + chunk : units;
      if (!run(fn, args, begin, end)) ok = false;
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    if ((done += mine) == chunks) finished.notify_all();
  }
};

template <class Args> Error run_all(ffi::ThreadPool& pool, Fn fn, const Args& args) {
  if (args.layout.V == 0) return Error::InvalidArgument("softmax_ext: the native kernels need at least one class.");
  if (args.layout.rows() == 0) return Error::Success();
  Plan p = plan(args.layout);
  bool ok = true;
  int64_t threads = p.units > p.grain ? pool.num_threads() : 1;
  if (threads <= 1) {
    ok = run(fn, &args, 0, p.units);
  } else {
    auto shared = std::make_shared<Shared>();
    shared->units = p.units;
    shared->chunk = p.units / (threads * 4) > p.grain ? p.units / (threads * 4) : p.grain;
    shared->chunks = (p.units + shared->chunk - 1) / shared->chunk;
    shared->fn = fn;
    shared->args = &args;
    int64_t helpers = threads - 1 < shared->chunks - 1 ? threads - 1 : shared->chunks - 1;
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->work(); });
    shared->work();
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->finished.wait(lock, [&] { return shared->done == shared->chunks; });
    ok = shared->ok;
  }
  return ok ? Error::Success() : Error(ffi::ErrorCode::kResourceExhausted, "softmax_ext: out of memory for scratch space.");
}

bool type_of(DataType t, Type& out) {
  switch (t) {
    case DataType::F32: out = Type::f32; return true;
    case DataType::F64: out = Type::f64; return true;
    case DataType::BF16: out = Type::bf16; return true;
    case DataType::F16: out = Type::f16; return true;
    default: return false;
  }
}
DataType compute_type(Type t) { return t == Type::f64 ? DataType::F64 : DataType::F32; }

bool layout_of(const AnyBuffer& x, int64_t axis, Layout& y) {
  auto d = x.dimensions();
  int64_t n = (int64_t)d.size();
  if (axis < 0 || axis >= n) return false;
  y = {1, d[axis], 1};
  for (int64_t i = 0; i < axis; ++i) y.outer *= d[i];
  for (int64_t i = axis + 1; i < n; ++i) y.inner *= d[i];
  return true;
}
bool same_shape(const AnyBuffer& a, const AnyBuffer& b) {
  auto x = a.dimensions(), y = b.dimensions();
  bool same = x.size() == y.size();
  for (size_t i = 0; same && i < x.size(); ++i) same = x[i] == y[i];
  return same;
}
bool like(const AnyBuffer& a, const AnyBuffer& b) { return a.element_type() == b.element_type() && same_shape(a, b); }
bool rows_of(const AnyBuffer& r, const AnyBuffer& x, int64_t axis) {
  auto a = r.dimensions(), b = x.dimensions();
  bool same = a.size() + 1 == b.size();
  for (int64_t i = 0; same && i < (int64_t)a.size(); ++i) same = a[i] == b[i < axis ? i : i + 1];
  return same;
}
bool rows_of(const AnyBuffer& r, const AnyBuffer& x, int64_t axis, Type type) {
  return r.element_type() == compute_type(type) && rows_of(r, x, axis);
}
void* fresh(Out& y) {
  advise_huge_pages(y->untyped_data(), (int64_t)y->size_bytes());
  return y->untyped_data();
}

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
    if ((t == DataType::S64 || t == DataType::S32) && rows_of(target, logits, axis))
      a.target_kind = t == DataType::S64 ? Target::i64 : Target::i32;
    else if (t == compute_type(a.type) && same_shape(target, logits))
      a.target_kind = Target::dense_compute_type;
    else if (like(target, logits))
      a.target_kind = Target::dense_logits_type;
    else
      return void(error = "target must hold int32 or int64, one per row, or have the logits' shape and type.");
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
  c.a.nll = c.row(out, true, logits, axis);
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
  c.a.d_nll = c.row(in, d_nll, logits, axis);
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
  c.a.d_nll = c.row(in, d_nll, logits, axis);
  c.a.d_lse = c.row(in, d_lse, logits, axis);
  c.a.d_smooth = c.row(in, d_smooth, logits, axis);
  c.a.d_entropy = c.row(in, d_entropy, logits, axis);
  c.a.dlogits = c.gradient(out, logits);
  c.a.nll = c.row(out, true, logits, axis);
  c.a.lse = c.row(out, true, logits, axis);
  c.a.smooth = c.row(out, smooth, logits, axis);
  c.a.entropy = c.row(out, entropy, logits, axis);
  c.a.m = c.row(out, true, logits, axis);
  c.a.rest = c.row(out, true, logits, axis);
  return c.finish("cross_entropy_fwd_bwd", pool, Fn::cross_entropy_fwd_bwd, in, out);
}

auto row_binding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

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

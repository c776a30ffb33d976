// What the handlers of the door for XLA share: checks of buffers, threads.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "huge_pages.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace softmax_ext::door {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using ffi::Error;
using Out = ffi::Result<AnyBuffer>;

inline Error wrong(const char* op, const std::string& what) {
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
  Writing* writing;  // so does this
  std::mutex mutex;
  std::condition_variable finished;

  void work() {
    int64_t mine = 0;
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks; ++mine) {
      int64_t begin = c * chunk, end = begin + chunk < units ? begin + chunk : units;
      if (!writing->run(fn, args, begin, end)) ok = false;
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    if ((done += mine) == chunks) finished.notify_all();
  }
};

template <class Args> Error run_units(ffi::ThreadPool& pool, Fn fn, const Args& args) {
  Plan p = plan(args);
  Writing writing(args);
  bool ok = true;
  int64_t threads = p.units > p.grain ? pool.num_threads() : 1;
  if (threads <= 1) {
    ok = writing.run(fn, &args, 0, p.units);
  } else {
    auto shared = std::make_shared<Shared>();
    shared->units = p.units;
    shared->chunk = p.units / (threads * 4) > p.grain ? p.units / (threads * 4) : p.grain;
    shared->chunks = (p.units + shared->chunk - 1) / shared->chunk;
    shared->fn = fn;
    shared->args = &args;
    shared->writing = &writing;
    int64_t helpers = threads - 1 < shared->chunks - 1 ? threads - 1 : shared->chunks - 1;
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->work(); });
    shared->work();
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->finished.wait(lock, [&] { return shared->done == shared->chunks; });
    ok = shared->ok;
  }
  return ok ? Error::Success() : Error(ffi::ErrorCode::kResourceExhausted, "softmax_ext: out of memory for scratch space.");
}

template <class Args> Error run_all(ffi::ThreadPool& pool, Fn fn, const Args& args) {
  if (args.layout.V == 0) return Error::InvalidArgument("softmax_ext: the native kernels need at least one class.");
  return args.layout.rows() == 0 ? Error::Success() : run_units(pool, fn, args);
}

inline bool type_of(DataType t, Type& out) {
  switch (t) {
    case DataType::F32: out = Type::f32; return true;
    case DataType::F64: out = Type::f64; return true;
    case DataType::BF16: out = Type::bf16; return true;
    case DataType::F16: out = Type::f16; return true;
    default: return false;
  }
}
inline DataType compute_type(Type t) { return t == Type::f64 ? DataType::F64 : DataType::F32; }

inline bool layout_of(const AnyBuffer& x, int64_t axis, Layout& y) {
  auto d = x.dimensions();
  int64_t n = (int64_t)d.size();
  if (axis < 0 || axis >= n) return false;
  y = {1, d[axis], 1};
  for (int64_t i = 0; i < axis; ++i) y.outer *= d[i];
  for (int64_t i = axis + 1; i < n; ++i) y.inner *= d[i];
  return true;
}
inline bool same_shape(const AnyBuffer& a, const AnyBuffer& b) {
  auto x = a.dimensions(), y = b.dimensions();
  bool same = x.size() == y.size();
  for (size_t i = 0; same && i < x.size(); ++i) same = x[i] == y[i];
  return same;
}
inline bool like(const AnyBuffer& a, const AnyBuffer& b) { return a.element_type() == b.element_type() && same_shape(a, b); }
inline bool rows_of(const AnyBuffer& r, const AnyBuffer& x, int64_t axis) {
  auto a = r.dimensions(), b = x.dimensions();
  bool same = a.size() + 1 == b.size();
  for (int64_t i = 0; same && i < (int64_t)a.size(); ++i) same = a[i] == b[i < axis ? i : i + 1];
  return same;
}
inline bool rows_of(const AnyBuffer& r, const AnyBuffer& x, int64_t axis, Type type) {
  return r.element_type() == compute_type(type) && rows_of(r, x, axis);
}
// K a row, along the classes' axis
inline bool classes_of(const AnyBuffer& r, const AnyBuffer& x, int64_t axis) {
  auto a = r.dimensions(), b = x.dimensions();
  bool same = a.size() == b.size();
  for (int64_t i = 0; same && i < (int64_t)a.size(); ++i) same = i == axis || a[i] == b[i];
  return same;
}
inline void* fresh(Out& y) {
  advise_huge_pages(y->untyped_data(), (int64_t)y->size_bytes());
  return y->untyped_data();
}

inline auto row_binding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace softmax_ext::door

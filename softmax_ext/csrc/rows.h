// The row functions on raw pointers: what a framework's door may call. No framework word below this line.
//
// Every array is contiguous. An array of logits has the layout (outer, V, inner): V is the softmax axis,
// so a middle axis needs no transpose. A row-shaped array has outer * inner entries.
// The compute type F is double for f64 and float for everything else.
#pragma once
#include <cstdint>

namespace softmax_ext {

enum class Type : int32_t { f32, f64, bf16, f16 };
enum class Target : int32_t { i64, i32, dense_logits_type, dense_compute_type };

struct Layout {
  int64_t outer, V, inner;
  int64_t rows() const { return outer * inner; }
};

struct SoftmaxFwd {
  Layout layout;
  Type type;
  const void* x;
  void* y;
};

struct SoftmaxBwd {
  Layout layout;
  Type type;
  const void *dy, *y;
  void* dx;
};

struct LogSoftmaxFwd {
  Layout layout;
  Type type;
  const void* x;
  void *y, *m, *rest;  // m, rest: F per row
};

struct LogSoftmaxBwd {
  Layout layout;
  Type type;
  const void *dy, *x, *m, *rest;
  void* dx;
};

// Integer target: 0 <= t < V counts, -1 is an ignored row (results 0, gradient exactly 0),
// anything else an invalid one (nll and gradient NaN). No value is ever used as an address unchecked.
struct CrossEntropy {
  Layout layout;
  Type type;
  const void* logits;
  const void* target;
  Target target_kind;
  const void* weight;                         // (V,) F, or null
  double scale;                               // > 0
  double softcap;                             // 0: none
  void *nll, *lse, *smooth, *entropy;         // forward results, F per row; each may be null
  void *m, *rest;                             // written by the forward (may be null), read by the backward
  const void *d_nll, *d_lse, *d_smooth, *d_entropy;  // upstream gradients, F per row, each may be null
  void* dlogits;                              // may be the logits themselves
  double weight_sum = 0;                      // filled by prepare()
};

enum class Fn : int32_t {
  softmax_fwd,
  softmax_bwd,
  log_softmax_fwd,
  log_softmax_bwd,
  cross_entropy_fwd,
  cross_entropy_bwd,
  cross_entropy_fwd_bwd,  // forward and gradient while the row is in cache; m, rest may be null
};

// How a call is cut: units are independent and each writes only its own rows, so any split over any
// number of threads gives the same bits.
struct Plan {
  int64_t units;
  int64_t grain;  // fewest units worth a thread
};

Plan plan(const Layout& layout);
void prepare(CrossEntropy& args);

// Runs units [begin, end). False: out of memory for scratch space (a few V * 16 values a thread).
bool run(Fn fn, const void* args, int64_t begin, int64_t end);

// Asks for huge pages under a fresh buffer of at least 4 MiB, before anything writes to it.
void advise_huge_pages(void* data, int64_t bytes);

// Which instruction set serves: 2 AVX-512, 1 AVX2 + FMA + F16C, 0 the build's baseline (NEON on arm64).
int instruction_set();
const char* instruction_set_name();
// For tests: lowers the choice (never raises it above what the CPU has) and returns the one in force.
int limit_instruction_set(int level);

}  // namespace softmax_ext

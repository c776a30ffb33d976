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
  // Filled by prepare(): the sum of the weights and, of a class that holds more than half of it, its place (else -1)
  // and the sum of the others, which is no difference.
  double weight_sum = 0, weight_aside = 0;
  int64_t heavy = -1;
  // K classes a row, (outer, K, inner), in the place of the integer target, which is not read: nll and d_nll then have
  // this shape, and m and rest are not null in any call. An id of -1 is no class at all (its nll is 0, its d_nll not
  // read), any other outside [0, V) makes a NaN of its nll and its row's gradient. A row without ids is ignored.
  const void* ids = nullptr;
  Target ids_kind = Target::i64;
  int64_t K = 0;
};

// What nll says of a class that has no probability, whose nll is infinite: no nll is negative.
constexpr double masked_nll = -1;

// K points a row on the cumulative sum of exp(z_j - m) in class order, the classes of `except` left out:
// point k is the first class where the sum passes (k + u_k) / K of `whole`.
struct Points {
  Layout layout;  // (N, V, 1)
  Type type;
  const void* logits;
  const void *m, *rest;  // F per row, as cross_entropy leaves them
  const void* except;    // (N, E) classes; -1 is no class; where E of them are -1 the row has no points
  Target except_kind;
  int64_t E;
  const float* u;        // (N, K), in [0, 1)
  int64_t K;
  // Null, or F (N, 3, 2): before, after and whole as sums of two numbers, where other classes lie elsewhere: points in
  // [before, after) of [0, whole) are found here, others are -1.
  const void* span;
  double scale, softcap;
  int32_t* ids;  // (N, K); -1: no class has any mass
  void* mass;    // F (N, 2): the whole sum as a sum of two numbers, NaN (and ids 0) in a row without a distribution
};

// x . W[id], and what follows from it: three products, each one's derivatives the other two. An id of -1 is no class,
// any other outside [0, V) stands for a row of NaN that takes no gradient.
struct Picked {
  Layout layout;  // (N, D, 1)
  Type type;
  const void *x, *w;  // (N, D), (V, D)
  const void* ids;    // (N, K)
  Target ids_kind;
  int64_t K, V;
  void* z;        // F (N, K): x_i . W[id_ik]
  const void* c;  // F (N, C), 1 <= C <= K: the first of a row's C numbers is that of all leading ids it has none for
  int64_t C;
  const void *by, *of_all;  // null, or F: an outer product to begin with, (N,) with (D,) or (V,) with (D,)
  void* dx;                 // (N, D): by_i of_all + sum_k c_ik W[id_ik]
  void* dw;                 // (V, D): by_v of_all + sum of c_ik x_i over id_ik = v
  bool wide;                // dx and dw are of the compute type F, not of T
  const struct Pairs* pairs = nullptr;  // for dw
};

// The pairs i K + k of a range of classes in the order of their classes, so that each class is summed by one thread in
// the order of its pairs: the same bits for any number of threads.
struct Pairs {
  static constexpr int64_t units = 64;
  int64_t from, to;         // the classes
  const int64_t* start;     // (V + 1,): how many pairs come before class v
  const uint32_t* small;    // those of the range in order: one of the two, or neither: where one class has more pairs
  const int64_t* large;     // than there is room for, they are found one by one
  int64_t unit[units + 1];  // where each unit's classes begin
};

enum class Kind : int32_t { forward_kl, reverse_kl, jsd, tv };

constexpr int64_t row_state = 7;  // numbers that a divergence's forward leaves for the backward
// Of a slice of the classes of rows whose state is known: its sums of q f(p / q), p - q and p u.
constexpr int64_t row_sums = 3;

// Two rows of logits of one layout and type. The teacher is a constant.
struct Divergence {
  Layout layout;
  Type type;
  const void *student, *teacher;
  Kind kind;
  double beta;                                      // of jsd, in (0, 1)
  double scale, softcap, teacher_scale, teacher_softcap;  // as in CrossEntropy
  const uint8_t* keep;                              // one a row, or null: 0 is a row with value and gradient 0
  void* value;                                      // F per row
  void* state;                                      // F (rows, row_state): written by the forward, read by the backward
  void* sums = nullptr;                             // F (rows, row_sums): where not null, the forward forms these alone
  const void* d_value;                              // F per row
  void* dstudent;                                   // may be the student's logits
};

enum class Fn : int32_t {
  softmax_fwd,
  softmax_bwd,
  log_softmax_fwd,
  log_softmax_bwd,
  cross_entropy_fwd,
  cross_entropy_bwd,
  cross_entropy_fwd_bwd,  // forward and gradient while the row is in cache; m, rest may be null
  points,
  picked_fwd,         // z
  picked_input_bwd,   // dx
  divergence_fwd,
  divergence_bwd,
  divergence_fwd_bwd,  // state may be null
  picked_weight_bwd,  // dw, of the classes that `sorted` has in order
};

// How a call is cut: units are independent and each writes only its own rows, so any split over any
// number of threads gives the same bits.
struct Plan {
  int64_t units;
  int64_t grain;  // fewest units worth a thread
};

Plan plan(const Layout& layout);
Plan plan(const Points& args);
Plan plan(const Picked& args);
Plan plan(const Divergence& args);
template <class Args> Plan plan(const Args& args) { return plan(args.layout); }
void prepare(CrossEntropy& args);

// Runs units [begin, end). False: out of memory for scratch space (a few V * 16 values a thread).
bool run(Fn fn, const void* args, int64_t begin, int64_t end);

// Which instruction set serves: 2 AVX-512, 1 AVX2 + FMA + F16C, 0 the build's baseline (NEON on arm64).
int instruction_set();
const char* instruction_set_name();
// For tests: lowers the choice (never raises it above what the CPU has) and returns the one in force.
int limit_instruction_set(int level);

}  // namespace softmax_ext

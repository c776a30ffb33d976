// Asks for huge pages, times what writes to them, and leaves off for a while where they are dear.
#include "huge_pages.h"

#include <chrono>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace softmax_ext {
namespace {

// A virtual machine may hand free memory back to its host, huge page by huge page (free page reporting), and has to
// wait for the host when it takes one again: 2 MiB then cost 4.6 ms instead of 0.1, while pages of 4 KiB come at 0.7
// from the leavings of others, which are too small to be handed back.
constexpr double dear = 1.2;  // nanoseconds a byte and thread: four times a kernel's own work, half of a host's
constexpr int64_t fewest = 4, most = 64;

thread_local int64_t advised = 0;
std::atomic<int64_t> without{0};  // so many results more go without
std::atomic<int64_t> last{0};     // so many did after the last dear ones
std::atomic<int64_t> in_a_row{0};  // dear ones

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Fresh memory costs a fault per page: a copy of (1024, 32000) floats into it takes 38 ms with 4 KiB pages,
  // 9 ms with 2 MiB ones (transparent huge pages in mode "madvise"). Advice about pages already there is free.
  // glibc's malloc keeps smaller blocks, pages and all: advised or not, a loop of calls takes the same time.
  constexpr uintptr_t page = 4096;
  if (bytes < (32 << 20)) return;
  if (int64_t n = without.load(std::memory_order_relaxed); n > 0) {
    without.compare_exchange_strong(n, n - 1, std::memory_order_relaxed);
    return;
  }
  uintptr_t from = ((uintptr_t)data + page - 1) / page * page, to = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
  if (to > from && madvise((void*)from, to - from, MADV_HUGEPAGE) == 0) advised += bytes;
#endif
}

int64_t judge_huge_pages(int64_t bytes, int64_t nanoseconds) {
  if ((double)nanoseconds <= dear * (double)bytes) {
    in_a_row.store(0, std::memory_order_relaxed);
    last.store(0, std::memory_order_relaxed);
    without.store(0, std::memory_order_relaxed);
    return 0;
  }
  // A dear one fetches its pages back, and a loop has them at hand the next time: only the second in a row tells.
  if (in_a_row.fetch_add(1, std::memory_order_relaxed) % 2 == 0) return 0;
  int64_t n = 2 * last.load(std::memory_order_relaxed);
  n = n < fewest ? fewest : n > most ? most : n;
  last.store(n, std::memory_order_relaxed);
  without.store(n, std::memory_order_relaxed);
  return n;
}

int64_t Writing::take() {
  int64_t bytes = advised;
  advised = 0;
  // The baseline's own work on a byte may take as long as a dear page.
  return instruction_set() > 0 ? bytes : 0;
}

Writing::~Writing() {
  if (bytes_ > 0) judge_huge_pages(bytes_, nanoseconds_.load(std::memory_order_relaxed));
}

bool Writing::run(Fn fn, const void* args, int64_t begin, int64_t end) {
  if (bytes_ == 0) return softmax_ext::run(fn, args, begin, end);
  int64_t start = now();
  bool ok = softmax_ext::run(fn, args, begin, end);
  nanoseconds_.fetch_add(now() - start, std::memory_order_relaxed);
  return ok;
}

}  // namespace softmax_ext

// Huge pages under large fresh results, while the machine has them at hand.
#pragma once
#include <atomic>
#include <cstdint>

#include "rows.h"

namespace softmax_ext {

// Asks for huge pages under a fresh buffer of at least 32 MiB, before anything writes to it, unless they are dear now.
void advise_huge_pages(void* data, int64_t bytes);

// Runs the parts of a call on any thread, and sees what the pages cost that this thread has been advised about.
class Writing {
 public:
  template <class Args> explicit Writing(const Args& args) : bytes_(take()) {
    if (!rows_written(args)) bytes_ = 0;
  }
  Writing(const Writing&) = delete;
  ~Writing();
  bool run(Fn fn, const void* args, int64_t begin, int64_t end);

 private:
  static int64_t take();  // the bytes advised about since the last call
  // The rows' own work is a few tenths of a nanosecond a byte; that of others does not go by the size of what they write.
  static bool rows_written(const Points&) { return false; }
  static bool rows_written(const Picked&) { return false; }
  static bool rows_written(const Divergence&) { return false; }
  template <class Args> static bool rows_written(const Args&) { return true; }
  int64_t bytes_;
  std::atomic<int64_t> nanoseconds_{0};
};

// After a result of so many bytes that its threads together worked on for so long: how many go without huge pages now.
int64_t judge_huge_pages(int64_t bytes, int64_t nanoseconds);

}  // namespace softmax_ext

// Memory for one call on one thread; null when there is none.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace softmax_ext::SX_ISA {

struct Scratch {
  void* p;
  explicit Scratch(int64_t bytes) : p(std::aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64 + 64)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(p); }
};

}  // namespace softmax_ext::SX_ISA

// A counting sort of pairs (row, class) by class, a range of classes at a time.
#pragma once
#include <vector>

#include "rows.h"

namespace softmax_ext {

class Sorted {
 public:
  explicit Sorted(Picked& args);  // args.pairs is set
  bool next();                    // the next range of classes: how dw is gone through

 private:
  static constexpr int64_t room = 32 << 20;  // bytes of pairs; beside them two numbers a class
  Picked& args_;
  Pairs pairs_{};
  int64_t room_;
  std::vector<int64_t> start_, at_, large_;
  std::vector<uint32_t> small_;
};

}  // namespace softmax_ext

// Many threads in one call and in many calls at once, on every instruction set, give the bits of one thread.
// Built with the thread sanitiser: a unit that touched its neighbour's rows would be a race.
#include <atomic>
#include <thread>

#include "drive_rows.h"

namespace {

constexpr int threads = 4;

// Units claimed one by one, in whatever order: smaller pieces than any door cuts.
void run_together(Fn fn, const void* args, int64_t units) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i)
    pool.emplace_back([&] {
      for (int64_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < units;)
        if (!run(fn, args, u, u + 1)) std::abort();
    });
  for (auto& t : pool) t.join();
}

using Bits = std::vector<std::vector<char>>;
Bits bits(const std::vector<Buffer*>& outputs) {
  Bits b;
  for (Buffer* o : outputs) b.emplace_back(o->p, o->p + o->bytes);
  return b;
}

void one(Layout y, Type type) {
  drive(y, type, 1, [&](Fn fn, const void* args, const std::vector<Buffer*>& outputs) {
    if (outputs.empty()) return;  // in place: the second run would start from the first one's result
    int64_t units = plan(y).units;
    if (!run(fn, args, 0, units)) std::abort();
    Bits alone = bits(outputs);
    for (Buffer* o : outputs) std::memset(o->p, 0x55, o->bytes);
    run_together(fn, args, units);
    if (bits(outputs) != alone) std::abort();
  });
}

void classes(int64_t N, int64_t D, int64_t V, int64_t K, Type type) {
  drive_classes(N, D, V, K, type, 1, [&](Fn fn, const void* args, int64_t units, const std::vector<Buffer*>& outputs) {
    if (!run(fn, args, 0, units)) std::abort();
    Bits alone = bits(outputs);
    for (Buffer* o : outputs) std::memset(o->p, 0x55, o->bytes);
    run_together(fn, args, units);
    if (bits(outputs) != alone) std::abort();
  });
}

void every_call() {
  for (Type t : {Type::f32, Type::f64, Type::bf16, Type::f16}) classes(40, 33, 70, 9, t), classes(300, 2, 3, 7, t);
  for (Type t : {Type::f32, Type::f64, Type::bf16, Type::f16})
    for (Layout y : {Layout{7, 200, 1}, Layout{150, 5, 1}, Layout{3, 5, 70}, Layout{40, 5, 3}, Layout{6, 150, 3}}) one(y, t);
}

}  // namespace

int main() {
  std::vector<std::thread> callers;  // the first calls of this process, all at once
  for (int i = 0; i < threads; ++i) callers.emplace_back([] { one({7, 200, 1}, Type::f32); });
  for (auto& t : callers) t.join();
  for (int level = 0; level <= 2; ++level)
    if (limit_instruction_set(level) == level) every_call();
  std::printf("threads agree, instruction set %s\n", instruction_set_name());
}

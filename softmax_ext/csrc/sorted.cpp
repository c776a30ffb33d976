#include "sorted.h"

namespace softmax_ext {
namespace {

template <class F> void each_id(const Picked& a, F f) {
  const int64_t pairs = a.layout.outer * a.K;
  if (a.ids_kind == Target::i64)
    for (int64_t p = 0; p < pairs; ++p) f(((const int64_t*)a.ids)[p], p);
  else
    for (int64_t p = 0; p < pairs; ++p) f((int64_t)((const int32_t*)a.ids)[p], p);
}

}  // namespace

Sorted::Sorted(Picked& args) : args_(args), start_((std::size_t)args.V + 1), at_((std::size_t)args.V) {
  const bool wide = args.layout.outer * args.K > (int64_t)UINT32_MAX;
  room_ = room / (wide ? 8 : 4);
  int64_t* start = start_.data();
  each_id(args, [&](int64_t v, int64_t) {
    if (v >= 0 && v < args.V) ++start[v + 1];
  });
  for (int64_t v = 0; v < args.V; ++v) start[v + 1] += start[v];
  const auto most = (std::size_t)(start[args.V] < room_ ? start[args.V] : room_);
  if (wide) large_.resize(most);
  else small_.resize(most);
  pairs_.start = start;
  args.pairs = &pairs_;
}

bool Sorted::next() {
  if (pairs_.to >= args_.V) return false;
  const int64_t* start = start_.data();
  const int64_t from = pairs_.from = pairs_.to;
  int64_t to = from + 1;
  while (to < args_.V && start[to + 1] - start[from] <= room_) ++to;
  pairs_.to = to;
  // Units of equal work: a class costs about as much as four pairs, it is written whether it has pairs or not.
  auto work = [&](int64_t v) { return start[v] - start[from] + 4 * (v - from); };
  int64_t v = from;
  for (int64_t u = 0; u < Pairs::units; ++u) {
    while (v < to && work(v) < work(to) / Pairs::units * u) ++v;
    pairs_.unit[u] = v;
  }
  pairs_.unit[Pairs::units] = to;
  pairs_.small = nullptr;
  pairs_.large = nullptr;
  if (start[to] - start[from] > room_) return true;
  int64_t *at = at_.data(), *large = large_.data();
  uint32_t* small = small_.data();
  for (int64_t c = from; c < to; ++c) at[c] = start[c] - start[from];
  const bool wide = small_.empty();
  each_id(args_, [&](int64_t c, int64_t p) {
    if (c < from || c >= to) return;
    if (wide) large[at[c]++] = p;
    else small[at[c]++] = (uint32_t)p;
  });
  pairs_.small = wide ? nullptr : small;
  pairs_.large = wide ? large : nullptr;
  return true;
}

}  // namespace softmax_ext

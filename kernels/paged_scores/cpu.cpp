// SPDX-License-Identifier: Apache-2.0
// Inner products of a row's query with the keys that its slots name: one pass over these keys, which are read where they lie.
//
// As many slots as a vector has lanes go together: each leaves a vector of partial sums, and these are folded all at once, in the same
// order for every slot, so that a score depends on nothing but its query and its key.
#include <utility>

#include "native.h"

using namespace native;

namespace {

constexpr int64_t kSlots = 256;  // of a task

// Two vectors are folded in one: lanes with the bit kHalf are sums of b's, the others of a's.
template <int kHalf, int... kLane>
inline vf fold(vf a, vf b, std::integer_sequence<int, kLane...>) {
  return vf{(kLane & kHalf ? b[kLane & ~kHalf] : a[kLane])...} + vf{(kLane & kHalf ? b[kLane] : a[kLane | kHalf])...};
}

// Lane i of the result is the sum of the lanes of x[i], for kWidth vectors x, which are overwritten.
template <int kHalf = kWidth / 2>
inline vf sums(vf* x) {
  for (int i = 0; i < kHalf; ++i) x[i] = fold<kHalf>(x[i], x[i + kHalf], std::make_integer_sequence<int, kWidth>{});
  if constexpr (kHalf > 1)
    return sums<kHalf / 2>(x);
  else
    return x[0];
}

// Of x and y, lane by lane.
template <class T>
inline vf products(const T* x, const float* y, int64_t width) {
  vf total{};
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) total += load(x + i) * load(y + i);
  if (i < width) total += load(x + i, width - i) * load(y + i, width - i);
  return total;
}

// As native.py lists them; the strides are those of the pool.
struct Sizes {
  int64_t rows, heads, key_heads, width, pages, slots, page_stride, head_stride;
};

// Slots of 32 or of 64 bits.
struct Slots {
  const void* data;
  bool wide;
  int64_t at(int64_t place) const {
    return wide ? static_cast<const int64_t*>(data)[place] : static_cast<const int32_t*>(data)[place];
  }
};

bool divides(const int64_t* offsets, const Sizes& sizes) {
  return offsets[0] == 0 && offsets[sizes.rows] == sizes.slots && std::is_sorted(offsets, offsets + sizes.rows + 1);
}

// The scores of up to kWidth slots of one row, from `begin` on; false where one is beyond the pool.
template <class T>
bool score(const float* q, const T* pages, const Slots& slots, int64_t begin, int64_t count, const Sizes& sizes, float* scores) {
  const T* keys[kWidth] = {};
  vi missing{};
  for (int lane = 0; lane < count; ++lane) {
    const int64_t slot = slots.at(begin + lane);
    if (slot < -1 || slot >= sizes.pages) return false;
    missing[lane] = slot < 0 ? -1 : 0;
    if (slot >= 0) keys[lane] = pages + slot * sizes.page_stride;
  }
  const int64_t sharing = sizes.heads / sizes.key_heads;
  for (int64_t head = 0; head < sizes.heads; ++head) {
    const int64_t place = head / sharing * sizes.head_stride;
    const float* query = q + head * sizes.width;
    vf partial[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) partial[lane] = keys[lane] ? products(keys[lane] + place, query, sizes.width) : vf{};
    store(scores + head * sizes.slots + begin, missing ? broadcast(-kInfinity) : sums(partial), count);
  }
  return true;
}

// Returns 0, or 1 where a slot is beyond the pool or the offsets do not divide the slots.
template <class T>
int64_t score_all(const float* q, const T* pages, const Slots& slots, const int64_t* offsets, const Sizes& sizes, int64_t threads,
                  float* scores) {
  if (!divides(offsets, sizes)) return 1;
  std::atomic<bool> beyond{false};
  parallel_for((sizes.slots + kSlots - 1) / kSlots, threads, [&](int64_t task) {
    const int64_t end = std::min(sizes.slots, (task + 1) * kSlots);
    int64_t begin = task * kSlots, row = std::upper_bound(offsets, offsets + sizes.rows + 1, begin) - offsets - 1;
    while (begin < end) {
      while (offsets[row + 1] <= begin) ++row;
      const int64_t count = std::min<int64_t>(kWidth, std::min(end, offsets[row + 1]) - begin);
      if (!score(q + row * sizes.heads * sizes.width, pages, slots, begin, count, sizes, scores)) beyond = true;
      begin += count;
    }
  });
  return beyond;
}

}  // namespace

extern "C" {

// q [B, H, e]; pages [P, H_kv, e], each key together; slots [S] of 32 or, if wide, 64 bits; offsets [B + 1]; scores [H, S].
int64_t paged_scores_f32(const float* q, const float* pages, const void* slots, int64_t wide, const int64_t* offsets, const Sizes* sizes,
                         int64_t threads, float* scores) {
  return score_all(q, pages, {slots, wide != 0}, offsets, *sizes, threads, scores);
}

int64_t paged_scores_bf16(const float* q, const uint16_t* pages, const void* slots, int64_t wide, const int64_t* offsets,
                          const Sizes* sizes, int64_t threads, float* scores) {
  return score_all(q, pages, {slots, wide != 0}, offsets, *sizes, threads, scores);
}
}

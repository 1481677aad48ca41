// SPDX-License-Identifier: Apache-2.0
// The k best items of each of B users, an item's score being the sum of one number for each of its K codes.
//
// Sixteen users at a time: the numbers of a code lie in one register, and an item is K loads, K - 1 sums, and one comparison with the
// users' k-th best so far, which hardly any item passes. What passes is looked at closer: is it excluded for this user? If not, it waits
// in the user's room, and when that is full, its k best stay and the k-th best moves up. No score of an item that is not among them is
// ever written.
#include <functional>

#include "native.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

using native::key_of;  // in the order of the lists, see recsys.retrieval.catalogue.topk
using native::score_of;

namespace {

constexpr int kLanes = 16;

struct Excluded {
  const int64_t* offsets;  // [B + 1]
  const int64_t* rows;     // ascending within a user
  bool has(int64_t user, int64_t row) const {
    return offsets && std::binary_search(rows + offsets[user], rows + offsets[user + 1], row);
  }
};

// The best of one user that a thread has seen.
struct Best {
  std::vector<uint64_t> keys;
  size_t k = 0;
  void cut() {
    if (keys.size() <= k) return;
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<uint64_t>());
    keys.resize(k);
  }
};

// Which of the sixteen sums of an item's codes are above the users' thresholds; the sums are left in `sums`. Zero levels for any number.
template <int kLevels>
inline uint32_t passing(const float* weights, const int32_t* codes, int64_t any, const float* thresholds, float* sums) {
  const int64_t levels = kLevels ? kLevels : any;
#if defined(__AVX512F__)
  __m512 total = _mm512_loadu_ps(weights + codes[0] * kLanes);
  for (int64_t level = 1; level < levels; ++level) total = _mm512_add_ps(total, _mm512_loadu_ps(weights + codes[level] * kLanes));
  const uint32_t above = _mm512_cmp_ps_mask(total, _mm512_loadu_ps(thresholds), _CMP_GT_OQ);
  if (above) _mm512_storeu_ps(sums, total);
  return above;
#elif defined(__AVX2__)
  __m256 low = _mm256_loadu_ps(weights + codes[0] * kLanes), high = _mm256_loadu_ps(weights + codes[0] * kLanes + 8);
  for (int64_t level = 1; level < levels; ++level) {
    low = _mm256_add_ps(low, _mm256_loadu_ps(weights + codes[level] * kLanes));
    high = _mm256_add_ps(high, _mm256_loadu_ps(weights + codes[level] * kLanes + 8));
  }
  const uint32_t above = uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(low, _mm256_loadu_ps(thresholds), _CMP_GT_OQ))) |
                         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(high, _mm256_loadu_ps(thresholds + 8), _CMP_GT_OQ))) << 8;
  if (above) {
    _mm256_storeu_ps(sums, low);
    _mm256_storeu_ps(sums + 8, high);
  }
  return above;
#else
  std::memcpy(sums, weights + codes[0] * kLanes, kLanes * sizeof(float));
  for (int64_t level = 1; level < levels; ++level)
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += weights[codes[level] * kLanes + lane];
  uint32_t above = 0;
  for (int lane = 0; lane < kLanes; ++lane) above |= uint32_t(sums[lane] > thresholds[lane]) << lane;
  return above;
#endif
}

// Let other threads know that k items are at least as good. One of theirs with the same score may have a smaller row, so what they hear
// is the next smaller number.
inline void raise(std::atomic<float>& shared, float limit) {
  const float below = std::nextafter(limit, -std::numeric_limits<float>::infinity());
  float seen = shared.load(std::memory_order_relaxed);
  while (seen < below && !shared.compare_exchange_weak(seen, below, std::memory_order_relaxed)) {
  }
}

// One thread's share of the items, for all users. Items come in ascending order, so at the k-th best score an item is too late.
template <int kLevels>
void scan(const float* weights, int64_t width, int64_t groups, int64_t users, const int32_t* bags, int64_t levels, const int64_t* rows, int64_t begin,
          int64_t end, const Excluded& excluded, size_t k, std::vector<Best>& best, std::vector<std::atomic<float>>& shared) {
  const int64_t lanes = groups * kLanes;
  const size_t room = std::max<size_t>(2 * k, 128);
  std::vector<float> thresholds(size_t(lanes), -std::numeric_limits<float>::infinity());
  for (int64_t lane = users; lane < lanes; ++lane) thresholds[size_t(lane)] = std::numeric_limits<float>::infinity();
  for (Best& own : best) {
    own.k = k;
    own.keys.reserve(std::min(room, size_t(end - begin)));
  }
  constexpr int64_t kTile = 2048;  // items whose codes stay in the first cache while all groups of users look at them
  float sums[kLanes];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t stop = std::min(tile + kTile, end);
    for (int64_t group = 0; group < groups; ++group) {
      const float* own = weights + group * width * kLanes;
      float* limit = thresholds.data() + group * kLanes;
      for (int lane = 0; lane < kLanes && group * kLanes + lane < users; ++lane)
        limit[lane] = std::max(limit[lane], shared[size_t(group * kLanes + lane)].load(std::memory_order_relaxed));
      for (int64_t item = tile; item < stop; ++item) {
        const int64_t row = rows ? rows[item] : item;
        uint32_t above = passing<kLevels>(own, bags + row * levels, levels, limit, sums);
        while (above) {
          const int lane = __builtin_ctz(above);
          above &= above - 1;
          const int64_t user = group * kLanes + lane;
          if (excluded.has(user, row)) continue;
          std::vector<uint64_t>& keys = best[size_t(user)].keys;
          keys.push_back(key_of(sums[lane], uint32_t(row)));
          if (keys.size() >= room) {
            best[size_t(user)].cut();
            limit[lane] = std::max(limit[lane], score_of(keys[k - 1]));
            raise(shared[size_t(user)], limit[lane]);
          }
        }
      }
    }
  }
}

}  // namespace

// Weights float [groups, V, 16], so that what one group reads lies together, users beyond the last of any value; bags int32 [N, K], rows of the weights; rows int64 [count] of the bags,
// ascending, or null for the first `count`; excluded offsets int64 [B + 1] and rows, or null; out uint64 [B, k], best first, 0 for none.
extern "C" void gather_topk(const float* weights, int64_t width, int64_t groups, int64_t users, const int32_t* bags, int64_t levels, const int64_t* rows,
                            int64_t count, const int64_t* excluded_offsets, const int64_t* excluded_rows, int64_t k, int64_t threads,
                            uint64_t* out) {
  const Excluded excluded{excluded_offsets, excluded_rows};
  threads = std::max<int64_t>(1, std::min(threads, count / 4096));
  std::vector<std::vector<Best>> best;  // of each thread, of each user
  best.resize(size_t(threads), std::vector<Best>(size_t(users)));
  std::vector<std::atomic<float>> shared(static_cast<size_t>(users));
  for (std::atomic<float>& limit : shared) limit.store(-std::numeric_limits<float>::infinity(), std::memory_order_relaxed);
  native::parallel_for(threads, threads, [&](int64_t thread) {
    const auto run = levels == 4 ? scan<4> : levels == 3 ? scan<3> : levels == 8 ? scan<8> : scan<0>;
    run(weights, width, groups, users, bags, levels, rows, count * thread / threads, count * (thread + 1) / threads, excluded, size_t(k),
        best[size_t(thread)], shared);
  });
  for (int64_t user = 0; user < users; ++user) {
    std::vector<uint64_t>& all = best[0][size_t(user)].keys;
    for (size_t thread = 1; thread < best.size(); ++thread) {
      const std::vector<uint64_t>& more = best[thread][size_t(user)].keys;
      all.insert(all.end(), more.begin(), more.end());
    }
    const size_t found = std::min(all.size(), size_t(k));
    std::partial_sort(all.begin(), all.begin() + int64_t(found), all.end(), std::greater<uint64_t>());
    std::copy_n(all.begin(), found, out + user * k);
  }
}

// SPDX-License-Identifier: Apache-2.0
// What the loops in C++ share: vectors of floats, their exponential, bfloat16, products of small matrices, and threads.
//
// Compiled without -ffast-math: sums are taken in the order that is written here, so that a result depends on neither the number of
// threads nor on what else is in the batch.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace native {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats of a vector
#else
constexpr int kWidth = 8;
#endif
typedef float vf __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2), aligned(2)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline vf broadcast(float x) { return vf{} + x; }

inline vf max(vf a, vf b) { return a > b ? a : b; }

// Folds the lanes in halves; without a loop over the halves, which g++ would not unroll.
template <int kHalf, class Fold>
inline void halve(float* lanes, Fold fold) {
  for (int lane = 0; lane < kHalf; ++lane) lanes[lane] = fold(lanes[lane], lanes[lane + kHalf]);
  if constexpr (kHalf > 1) halve<kHalf / 2>(lanes, fold);
}

template <class Fold>
inline float folded(vf x, Fold fold) {
  float lanes[kWidth];
  std::memcpy(lanes, &x, sizeof x);
  halve<kWidth / 2>(lanes, fold);
  return lanes[0];
}

inline float sum(vf x) {
  return folded(x, [](float a, float b) { return a + b; });
}

inline float largest(vf x) {
  return folded(x, [](float a, float b) { return a > b ? a : b; });
}

// 0, 1, 2, ...
inline vi counting() {
  vi x{};
  for (int lane = 0; lane < kWidth; ++lane) x[lane] = lane;
  return x;
}

// e^x within two units of the last place: 2^n e^r with |r| <= ln 2 / 2. Below -87.3 it is 0, above 88.7 it is infinite.
inline vf exp(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which then stands in the lowest bits
  vf n = x * 1.44269504088896341f + magic;
  vi bits;
  std::memcpy(&bits, &n, sizeof n);
  n -= magic;
  vf r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  bits = (bits << 23) + 0x3f800000;
  vf scale;
  std::memcpy(&scale, &bits, sizeof scale);
  p *= scale;
  p = x < broadcast(-87.33654f) ? vf{} : p;
  p = x > broadcast(88.72283f) ? broadcast(kInfinity) : p;
  return x == x ? p : x;
}

// ln x within two units of the last place, for positive normal x: x = 2^n m with m from sqrt(1/2) to sqrt(2).
inline vf log(vf x) {
  vi bits;
  std::memcpy(&bits, &x, sizeof bits);
  vi n = (bits >> 23) - 126;
  bits = (bits & 0x7fffff) | 0x3f000000;
  vf m;
  std::memcpy(&m, &bits, sizeof m);
  const vi low = m < broadcast(0.707106781186547524f);
  n += low;  // -1 where it is true
  m = (low ? m + m : m) - 1.0f;
  vf p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vf square = m * m, exponent = __builtin_convertvector(n, vf);
  return m + (p * m * square + exponent * -2.12194440e-4f - 0.5f * square) + exponent * 0.693359375f;
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// Up to kWidth elements, widened to float; zeros beyond the last.
inline vf load(const float* from, int64_t count = kWidth) {
  vf x{};
  if (count >= kWidth)
    std::memcpy(&x, from, sizeof x);
  else
    for (int64_t lane = 0; lane < count; ++lane) x[lane] = from[lane];
  return x;
}

inline vf load(const uint16_t* from, int64_t count = kWidth) {  // bfloat16
  vh half{};
  if (count >= kWidth)
    std::memcpy(&half, from, sizeof half);
  else
    for (int64_t lane = 0; lane < count; ++lane) half[lane] = from[lane];
  const vu bits = __builtin_convertvector(half, vu) << 16;
  vf x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline void store(float* to, vf x, int64_t count = kWidth) {
  if (count >= kWidth)
    std::memcpy(to, &x, sizeof x);
  else
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = x[lane];
}

inline void store(uint16_t* to, vf x, int64_t count = kWidth) {  // to the nearest bfloat16, of two the even one
  vu bits;
  std::memcpy(&bits, &x, sizeof bits);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  const vh half = __builtin_convertvector(x == x ? rounded : quiet, vh);
  if (count >= kWidth)
    std::memcpy(to, &half, sizeof half);
  else
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = half[lane];
}

// A list's order as numbers: a better score is a larger key, then a smaller row; NaN is above infinity, -0.0 is 0.0. Never 0.
inline uint64_t key_of(float score, uint32_t row) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  if (score != score) bits = 0x7FC00000u;
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (uint64_t(bits) << 32) | (0xFFFFFFFFu - row);
}

inline float score_of(uint64_t key) {
  uint32_t bits = uint32_t(key >> 32);
  bits = bits >> 31 ? bits & 0x7FFFFFFFu : ~bits;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that this process has loaded, null where there is none: PyTorch's, whose threads are awake between its own loops.
// Another one beside it would fight with it for the cores, and threads of our own cost 20 microseconds each to start.
inline Region region() {
  static const Region found = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// Calls body(task) for every task once, by so many threads.
template <class Body>
void parallel_for(int64_t tasks, int64_t threads, Body body) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
  };
  if (region()) {
    region()([](void* own) { (*static_cast<decltype(work)*>(own))(); }, &work, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

// Where A lies: element (m, k) at data[m * m_stride + k * k_stride].
struct Operand {
  const float* data;
  int64_t m_stride, k_stride;
};

template <int kRows, int kVectors>
inline void tile(Operand a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t depth, bool add) {
  vf total[kRows][kVectors];
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) total[row][v] = add ? load(c + row * c_stride + v * kWidth) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + k * b_stride + v * kWidth);
    for (int row = 0; row < kRows; ++row) {
      const float value = a.data[row * a.m_stride + k * a.k_stride];
      for (int v = 0; v < kVectors; ++v) total[row][v] += value * columns[v];
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) store(c + row * c_stride + v * kWidth, total[row][v]);
}

template <int kRows>
inline void strip(Operand a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t columns, int64_t depth, bool add) {
  int64_t n = 0;
  for (; n + 2 * kWidth <= columns; n += 2 * kWidth) tile<kRows, 2>(a, b + n, b_stride, c + n, c_stride, depth, add);
  for (; n < columns; n += kWidth) tile<kRows, 1>(a, b + n, b_stride, c + n, c_stride, depth, add);
}

// C = A B, or C += A B: M rows, N columns, N being a multiple of kWidth, over a depth of K. B and C have their columns together.
inline void product(Operand a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows, int64_t columns, int64_t depth,
                    bool add) {
  constexpr int kTall = kWidth == 16 ? 8 : 4;  // as many sums as there are registers for
  int64_t row = 0;
  for (; row + kTall <= rows; row += kTall)
    strip<kTall>({a.data + row * a.m_stride, a.m_stride, a.k_stride}, b, b_stride, c + row * c_stride, c_stride, columns, depth, add);
  for (; row < rows; ++row)
    strip<1>({a.data + row * a.m_stride, a.m_stride, a.k_stride}, b, b_stride, c + row * c_stride, c_stride, columns, depth, add);
}

// A buffer that a thread keeps from task to task, with room for so many numbers.
inline float* room(std::vector<float>& held, int64_t count) {
  if (int64_t(held.size()) < count) held.resize(size_t(count));
  return held.data();
}

inline int64_t padded(int64_t count) { return (count + kWidth - 1) / kWidth * kWidth; }

}  // namespace native

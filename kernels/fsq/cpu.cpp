// SPDX-License-Identifier: Apache-2.0
// FSQ after its tanh or sigmoid, which PyTorch computes: rounding, numbering and scaling in one pass. Every operation is rounded by itself,
// as PyTorch's are, so that codes are those of the definition to the last bit.
#pragma STDC FP_CONTRACT OFF
#ifndef __clang__
#pragma GCC optimize("fp-contract=off")
#endif
#include "native.h"

using namespace native;

namespace {

constexpr int64_t kTogether = 64;  // groups of kWidth rows that a task takes

// Numbers by dimension, repeated along kWidth rows, as they lie in memory.
std::vector<float> repeated(const float* of_dimension, int64_t dims) {
  std::vector<float> all(static_cast<size_t>(dims * kWidth));
  for (int64_t i = 0; i < dims * kWidth; ++i) all[size_t(i)] = of_dimension[i % dims];
  return all;
}

// The nearest whole number, of two the even one, for |x| < 2^22; zero is positive.
vf nearest(vf x) {
  const float magic = 12582912.0f;
  return x + magic - magic;
}

// t [rows, dims] -> levels divided by `divisor`, or times `scale` less 1, in the type of `values`, and codes [rows].
template <bool kTanh, class T>
void forward(const float* t, T* values, int64_t* codes, int64_t rows, int64_t dims, const float* half, const float* offset, const float* scale,
             const int64_t* lowest, const int64_t* basis, int64_t threads) {
  const auto halves = repeated(half, dims), offsets = repeated(offset, dims), scales = repeated(scale, dims);
  const int64_t together = kTogether * kWidth;
  parallel_for((rows + together - 1) / together, threads, [&](int64_t part) {
    std::vector<float> levels(static_cast<size_t>(dims * kWidth));
    for (int64_t row = part * together; row < std::min(rows, (part + 1) * together); row += kWidth) {
      const int64_t begin = row * dims, count = std::min<int64_t>(kWidth, rows - row) * dims;
      for (int64_t i = 0; i < count; i += kWidth) {
        const vf level = nearest(load(t + begin + i, count - i) * load(&halves[size_t(i)]) - load(&offsets[size_t(i)]));
        store(&levels[size_t(i)], level);
        store(values + begin + i, kTanh ? level / load(&scales[size_t(i)]) : level * load(&scales[size_t(i)]) - 1.0f, count - i);
      }
      for (int64_t i = 0; i < count; i += dims) {
        int64_t code = 0;
        for (int64_t j = 0; j < dims; ++j) code += (int64_t(levels[size_t(i + j)]) + lowest[j]) * basis[j];
        codes[row + i / dims] = code;
      }
    }
  });
}

// dz = dy · slope · (1 - t²), or · t (1 - t).
template <bool kTanh, class T>
void backward(const T* dy, const float* t, T* dz, int64_t rows, int64_t dims, const float* slope, int64_t threads) {
  const auto slopes = repeated(slope, dims);
  const int64_t total = rows * dims, group = dims * kWidth, together = kTogether * group;
  parallel_for((total + together - 1) / together, threads, [&](int64_t part) {
    for (int64_t begin = part * together; begin < std::min(total, (part + 1) * together); begin += group)
      for (int64_t i = 0; i < std::min(group, total - begin); i += kWidth) {
        const int64_t left = total - begin - i;
        const vf own = load(t + begin + i, left);
        const vf bend = kTanh ? 1.0f - own * own : own * (1.0f - own);
        store(dz + begin + i, load(dy + begin + i, left) * load(&slopes[size_t(i)]) * bend, left);
      }
  });
}

}  // namespace

extern "C" {

void fsq_f32(const float* t, float* values, int64_t* codes, int64_t rows, int64_t dims, const float* half, const float* offset,
             const float* scale, const int64_t* lowest, const int64_t* basis, int64_t tanh, int64_t threads) {
  (tanh ? forward<true, float> : forward<false, float>)(t, values, codes, rows, dims, half, offset, scale, lowest, basis, threads);
}

void fsq_bf16(const float* t, uint16_t* values, int64_t* codes, int64_t rows, int64_t dims, const float* half, const float* offset,
              const float* scale, const int64_t* lowest, const int64_t* basis, int64_t tanh, int64_t threads) {
  (tanh ? forward<true, uint16_t> : forward<false, uint16_t>)(t, values, codes, rows, dims, half, offset, scale, lowest, basis, threads);
}

void fsq_backward_f32(const float* dy, const float* t, float* dz, int64_t rows, int64_t dims, const float* slope, int64_t tanh,
                      int64_t threads) {
  (tanh ? backward<true, float> : backward<false, float>)(dy, t, dz, rows, dims, slope, threads);
}

void fsq_backward_bf16(const uint16_t* dy, const float* t, uint16_t* dz, int64_t rows, int64_t dims, const float* slope, int64_t tanh,
                       int64_t threads) {
  (tanh ? backward<true, uint16_t> : backward<false, uint16_t>)(dy, t, dz, rows, dims, slope, threads);
}
}

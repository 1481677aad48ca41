// SPDX-License-Identifier: Apache-2.0
// What happens to a tile of logits between the matrix products: read twice while it lies in the cache, in the place of four times.
#include "native.h"

using namespace native;

namespace {

// Puts exponentials below `top` in the place of a row's logits, and returns their sum.
float exponentials(float* row, int64_t columns, float top) {
  const vf shift = broadcast(top);
  vf totals[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= columns; i += 2 * kWidth)
    for (int half = 0; half < 2; ++half) {
      const vf value = exp(load(row + i + half * kWidth) - shift);
      store(row + i + half * kWidth, value);
      totals[half] += value;
    }
  float rest = 0.0f;
  for (; i < columns; i += kWidth) {
    const vf value = exp(load(row + i, columns - i) - shift);
    store(row + i, value, columns - i);
    for (int64_t lane = 0; lane < std::min<int64_t>(kWidth, columns - i); ++lane) rest += value[lane];
  }
  return sum(totals[0] + totals[1]) + rest;
}

float largest_of(const float* row, int64_t columns) {
  vf tops[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  int64_t i = 0;
  for (; i + 2 * kWidth <= columns; i += 2 * kWidth)
    for (int half = 0; half < 2; ++half) tops[half] = max(tops[half], load(row + i + half * kWidth));
  float top = largest(max(tops[0], tops[1]));
  for (; i < columns; ++i) top = std::max(top, row[i]);
  return top;
}

}  // namespace

extern "C" {

// logits [rows, columns] become exponentials below each row's largest, which `top` takes, and `total` their sum.
void below_top(float* logits, float* top, float* total, int64_t rows, int64_t columns, int64_t threads) {
  parallel_for(rows, threads, [&](int64_t row) {
    top[row] = largest_of(logits + row * columns, columns);
    total[row] = exponentials(logits + row * columns, columns, top[row]);
  });
}

// logits [rows, columns] become exponentials below `top`.
void below(float* logits, const float* top, int64_t rows, int64_t columns, int64_t threads) {
  parallel_for(rows, threads, [&](int64_t row) { exponentials(logits + row * columns, columns, top[row]); });
}
}

// SPDX-License-Identifier: Apache-2.0
// What stands between the matrix products of the per-token SwiGLU, in one pass each way.
#include "native.h"

using namespace native;

namespace {

constexpr int64_t kTogether = 1 << 15;  // elements of a task

template <class Row>
void for_rows(int64_t rows, int64_t width, int64_t threads, Row body) {
  const int64_t together = std::max<int64_t>(1, kTogether / std::max<int64_t>(width, 1));
  parallel_for((rows + together - 1) / together, threads, [&](int64_t part) {
    for (int64_t row = part * together; row < std::min(rows, (part + 1) * together); ++row) body(row);
  });
}

template <class T>
void forward(const T* product, const float* scale, T* hidden, int64_t rows, int64_t width, int64_t threads) {
  for_rows(rows, width, threads, [&](int64_t row) {
    const T *gates = product + row * 2 * width, *ups = gates + width;
    const float factor = scale ? scale[row] : 1.0f;
    for (int64_t i = 0; i < width; i += kWidth) {
      const vf gate = load(gates + i, width - i) * factor, up = load(ups + i, width - i) * factor;
      store(hidden + row * width + i, gate * sigmoid(gate) * up, width - i);
    }
  });
}

template <class T>
void backward(const T* dhidden, const T* product, const float* scale, T* hidden, T* dproduct, float* dscale, int64_t rows, int64_t width,
              int64_t threads) {
  for_rows(rows, width, threads, [&](int64_t row) {
    const T *gates = product + row * 2 * width, *ups = gates + width;
    T *dgates = dproduct + row * 2 * width, *dups = dgates + width;
    const float factor = scale ? scale[row] : 1.0f;
    vf share{};
    for (int64_t i = 0; i < width; i += kWidth) {
      const int64_t left = width - i;
      const vf raw_gate = load(gates + i, left), raw_up = load(ups + i, left), pull = load(dhidden + row * width + i, left);
      const vf gate = raw_gate * factor, up = raw_up * factor, open = sigmoid(gate), silu = gate * open;
      const vf dgate = pull * up * (open + silu * (1.0f - open)), dup = pull * silu;
      store(hidden + row * width + i, silu * up, left);
      store(dgates + i, dgate * factor, left);
      store(dups + i, dup * factor, left);
      share += dgate * raw_gate + dup * raw_up;
    }
    if (dscale) dscale[row] = sum(share);
  });
}

// Copies parts of kBytes, or of `bytes` where that is 0, from one layout to another: batch, tokens and parts, whose strides are in bytes.
template <int kBytes>
void move(const char* from, char* to, int64_t batch, int64_t tokens, int64_t parts, int64_t bytes, const int64_t* from_by,
          const int64_t* to_by, int64_t threads) {
  const int64_t each = tokens * parts * bytes, together = std::max<int64_t>(1, kTogether / std::max<int64_t>(each, 1));
  parallel_for((batch + together - 1) / together, threads, [&](int64_t task) {
    for (int64_t b = task * together; b < std::min(batch, (task + 1) * together); ++b)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t p = 0; p < parts; ++p)
          std::memcpy(to + b * to_by[0] + t * to_by[1] + p * to_by[2], from + b * from_by[0] + t * from_by[1] + p * from_by[2],
                      size_t(kBytes ? kBytes : bytes));
  });
}

}  // namespace

extern "C" {

// From and to [batch, tokens, parts] of `bytes` each, with strides in bytes.
void move_parts(const char* from, char* to, int64_t batch, int64_t tokens, int64_t parts, int64_t bytes, int64_t from_b, int64_t from_t,
                int64_t from_p, int64_t to_b, int64_t to_t, int64_t to_p, int64_t threads) {
  const int64_t from_by[] = {from_b, from_t, from_p}, to_by[] = {to_b, to_t, to_p};
  const auto run = bytes == 16 ? move<16> : bytes == 32 ? move<32> : bytes == 64 ? move<64> : bytes == 128 ? move<128> : move<0>;
  run(from, to, batch, tokens, parts, bytes, from_by, to_by, threads);
}

void swiglu_f32(const float* product, const float* scale, float* hidden, int64_t rows, int64_t width, int64_t threads) {
  forward(product, scale, hidden, rows, width, threads);
}

void swiglu_bf16(const uint16_t* product, const float* scale, uint16_t* hidden, int64_t rows, int64_t width, int64_t threads) {
  forward(product, scale, hidden, rows, width, threads);
}

void swiglu_backward_f32(const float* dhidden, const float* product, const float* scale, float* hidden, float* dproduct, float* dscale,
                         int64_t rows, int64_t width, int64_t threads) {
  backward(dhidden, product, scale, hidden, dproduct, dscale, rows, width, threads);
}

void swiglu_backward_bf16(const uint16_t* dhidden, const uint16_t* product, const float* scale, uint16_t* hidden, uint16_t* dproduct,
                          float* dscale, int64_t rows, int64_t width, int64_t threads) {
  backward(dhidden, product, scale, hidden, dproduct, dscale, rows, width, threads);
}
}

// SPDX-License-Identifier: Apache-2.0
// RMSNorm, forward and backward: a row is read twice while it lies in the first cache, and nothing else is kept.
#include "native.h"

using namespace native;

namespace {

template <class T>
void forward(const T* x, const T* weight, T* y, float* scale, int64_t rows, int64_t width, float eps, int64_t threads) {
  const int64_t together = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(width, 1));
  parallel_for((rows + together - 1) / together, threads, [&](int64_t part) {
    for (int64_t row = part * together; row < std::min(rows, (part + 1) * together); ++row) {
      const T* own = x + row * width;
      vf squares[2] = {};
      for (int64_t i = 0, turn = 0; i < width; i += kWidth, turn ^= 1) {
        const vf value = load(own + i, width - i);
        squares[turn] += value * value;
      }
      const float factor = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / float(width) + eps);
      for (int64_t i = 0; i < width; i += kWidth)
        store(y + row * width + i, load(own + i, width - i) * factor * load(weight + i, width - i), width - i);
      scale[row] = factor;
    }
  });
}

// The gain's gradient is summed over blocks of rows, in `shares` [blocks, width]; how the rows are divided depends on their number alone.
template <class T>
void backward(const T* dy, const T* x, const T* weight, const float* scale, T* dx, float* shares, int64_t rows, int64_t width,
              int64_t blocks, int64_t threads) {
  parallel_for(blocks, threads, [&](int64_t block) {
    float* share = shares + block * width;
    std::fill_n(share, width, 0.0f);
    for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) {
      const T *own_dy = dy + row * width, *own_x = x + row * width;
      const float factor = scale[row];
      vf inner{};
      for (int64_t i = 0; i < width; i += kWidth)
        inner += load(own_dy + i, width - i) * load(weight + i, width - i) * load(own_x + i, width - i);
      const float pull = sum(inner) * factor * factor / float(width);
      for (int64_t i = 0; i < width; i += kWidth) {
        const int64_t left = width - i;
        const vf up = load(own_dy + i, left), value = load(own_x + i, left);
        store(dx + row * width + i, (up * load(weight + i, left) - value * pull) * factor, left);
        store(share + i, load(share + i, left) + up * value * factor, left);
      }
    }
  });
}

}  // namespace

extern "C" {

void rms_norm_f32(const float* x, const float* weight, float* y, float* scale, int64_t rows, int64_t width, double eps, int64_t threads) {
  forward(x, weight, y, scale, rows, width, float(eps), threads);
}

void rms_norm_bf16(const uint16_t* x, const uint16_t* weight, uint16_t* y, float* scale, int64_t rows, int64_t width, double eps,
                   int64_t threads) {
  forward(x, weight, y, scale, rows, width, float(eps), threads);
}

void rms_norm_backward_f32(const float* dy, const float* x, const float* weight, const float* scale, float* dx, float* shares, int64_t rows,
                           int64_t width, int64_t blocks, int64_t threads) {
  backward(dy, x, weight, scale, dx, shares, rows, width, blocks, threads);
}

void rms_norm_backward_bf16(const uint16_t* dy, const uint16_t* x, const uint16_t* weight, const float* scale, uint16_t* dx, float* shares,
                            int64_t rows, int64_t width, int64_t blocks, int64_t threads) {
  backward(dy, x, weight, scale, dx, shares, rows, width, blocks, threads);
}
}

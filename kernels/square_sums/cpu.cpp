// SPDX-License-Identifier: Apache-2.0
// Sums of squares of the parts of a tensor [batch, tokens, parts, width], and their gradient: each number is read once each way.
//
// Of tokens and parts the axis with the larger stride in x is walked outside, so that either of two layouts is read as it lies in memory.
// Sums of several parts are folded side by side, which costs a short part less than a sum across a vector of its own.
#include <utility>

#include "native.h"

using namespace native;

namespace {

constexpr int64_t kTogether = 1 << 15;  // numbers of a task

// An axis: how many, and the strides of x, of the sums or their gradient, and of the gradient of x.
struct Axis {
  int64_t count, x, sums, dx;
};

struct Parts {
  Axis batch, outer, inner;
  int64_t width;

  Parts(Axis batch, Axis tokens, Axis parts, int64_t width) : batch(batch), outer(tokens), inner(parts), width(width) {
    if (inner.count == 1 || (outer.count > 1 && outer.x < inner.x)) std::swap(outer, inner);
  }

  // Calls body(x, sums, dx) for every row of parts along the inner axis, with the offsets of its first one.
  template <class Row>
  void for_rows(int64_t threads, Row body) const {
    const int64_t rows = batch.count * outer.count, together = std::max<int64_t>(1, kTogether / std::max<int64_t>(inner.count * width, 1));
    parallel_for((rows + together - 1) / together, threads, [&](int64_t task) {
      for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); ++row) {
        const int64_t b = row / outer.count, o = row % outer.count;
        body(b * batch.x + o * outer.x, b * batch.sums + o * outer.sums, b * batch.dx + o * outer.dx);
      }
    });
  }

  // Calls body with the width as a constant where there is a form for it and the parts of a row lie together, else with 0.
  template <class Body>
  void by_width(bool together, Body body) const {
    switch (together ? width : 0) {
      case 1: return body(std::integral_constant<int, 1>{});
      case 2: return body(std::integral_constant<int, 2>{});
      case 4: return body(std::integral_constant<int, 4>{});
      case 8: return body(std::integral_constant<int, 8>{});
      default: return body(std::integral_constant<int, 0>{});
    }
  }
};

using Half = std::make_integer_sequence<int, kWidth / 2>;

// The sums of every two neighbouring lanes, of `low` and then of `high`.
template <int... lane>
inline vf paired(vf low, vf high, std::integer_sequence<int, lane...>) {
  return vf{low[2 * lane]..., high[2 * lane]...} + vf{low[2 * lane + 1]..., high[2 * lane + 1]...};
}

// The sums of every n neighbouring lanes of n vectors, in order.
template <int n>
inline vf folded(const vf* x) {
  if constexpr (n == 1)
    return *x;
  else
    return paired(folded<n / 2>(x), folded<n / 2>(x + n / 2), Half{});
}

// Half of the lanes, those from `first` on, each of them twice.
template <int first, int... lane>
inline vf doubled(vf x, std::integer_sequence<int, lane...>) {
  return vf{x[first + lane / 2]..., x[first + kWidth / 4 + lane / 2]...};
}

// Every lane n times, in n vectors, in order.
template <int n>
inline void spread(vf x, vf* to) {
  if constexpr (n == 1) {
    *to = x;
  } else {
    spread<n / 2>(doubled<0>(x, Half{}), to);
    spread<n / 2>(doubled<kWidth / 2>(x, Half{}), to + n / 2);
  }
}

// The squares of a part, summed by lane.
template <class T>
inline vf squares(const T* x, int64_t width) {
  vf total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= width; i += 4 * kWidth)
    for (int v = 0; v < 4; ++v) {
      const vf value = load(x + i + v * kWidth);
      total[v] += value * value;
    }
  for (; i < width; i += kWidth) {
    const vf value = load(x + i, width - i);
    total[0] += value * value;
  }
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// The sums of a row of parts; w is 0, or the width of parts that lie together.
template <int w, class T>
void sum_row(const T* x, float* sums, const Axis& axis, int64_t width) {
  for (int64_t part = 0; part < axis.count; part += kWidth) {
    const int64_t left = std::min<int64_t>(axis.count - part, kWidth);
    vf found;
    if constexpr (w > 0) {
      vf own[w];
      for (int v = 0; v < w; ++v) own[v] = load(x + part * w + v * kWidth, left * w - v * kWidth);
      for (vf& value : own) value *= value;
      found = folded<w>(own);
    } else {
      vf own[kWidth] = {};
      for (int64_t i = 0; i < left; ++i) own[i] = squares(x + (part + i) * axis.x, width);
      found = folded<kWidth>(own);
    }
    if (axis.sums == 1)
      store(sums + part, found, left);
    else
      for (int64_t i = 0; i < left; ++i) sums[(part + i) * axis.sums] = found[i];
  }
}

// The gradient of a row of parts; w as above.
template <int w, class T>
void pull_row(const float* dsums, const T* x, T* dx, const Axis& axis, int64_t width) {
  for (int64_t part = 0; part < axis.count; part += kWidth) {
    const int64_t left = std::min<int64_t>(axis.count - part, kWidth);
    vf factors{};
    for (int64_t i = 0; i < left; ++i) factors[i] = 2.0f * dsums[(part + i) * axis.sums];
    if constexpr (w > 0) {
      vf own[w];
      spread<w>(factors, own);
      for (int v = 0; v < w; ++v) {
        const int64_t at = part * w + v * kWidth, count = left * w - v * kWidth;
        store(dx + at, load(x + at, count) * own[v], count);
      }
    } else {
      for (int64_t i = 0; i < left; ++i) {
        const T* from = x + (part + i) * axis.x;
        T* to = dx + (part + i) * axis.dx;
        for (int64_t n = 0; n < width; n += kWidth) store(to + n, load(from + n, width - n) * factors[i], width - n);
      }
    }
  }
}

template <class T>
void forward(const T* x, float* sums, const Parts& parts, int64_t threads) {
  parts.by_width(parts.inner.x == parts.width, [&](auto known) {
    parts.for_rows(threads, [&](int64_t x_at, int64_t sums_at, int64_t) {
      sum_row<known()>(x + x_at, sums + sums_at, parts.inner, parts.width);
    });
  });
}

template <class T>
void backward(const float* dsums, const T* x, T* dx, const Parts& parts, int64_t threads) {
  parts.by_width(parts.inner.x == parts.width && parts.inner.dx == parts.width, [&](auto known) {
    parts.for_rows(threads, [&](int64_t x_at, int64_t sums_at, int64_t dx_at) {
      pull_row<known()>(dsums + sums_at, x + x_at, dx + dx_at, parts.inner, parts.width);
    });
  });
}

}  // namespace

// Sizes batch, tokens, parts and width; then the strides of the first three axes, of each tensor that may lie anyhow.
extern "C" {

void square_sums_f32(const float* x, float* sums, int64_t b, int64_t t, int64_t p, int64_t width, int64_t x_b, int64_t x_t, int64_t x_p,
                     int64_t threads) {
  forward(x, sums, {{b, x_b, t * p, 0}, {t, x_t, p, 0}, {p, x_p, 1, 0}, width}, threads);
}

void square_sums_bf16(const uint16_t* x, float* sums, int64_t b, int64_t t, int64_t p, int64_t width, int64_t x_b, int64_t x_t,
                      int64_t x_p, int64_t threads) {
  forward(x, sums, {{b, x_b, t * p, 0}, {t, x_t, p, 0}, {p, x_p, 1, 0}, width}, threads);
}

void square_sums_backward_f32(const float* dsums, const float* x, float* dx, int64_t b, int64_t t, int64_t p, int64_t width, int64_t s_b,
                              int64_t s_t, int64_t s_p, int64_t x_b, int64_t x_t, int64_t x_p, int64_t dx_b, int64_t dx_t, int64_t dx_p,
                              int64_t threads) {
  backward(dsums, x, dx, {{b, x_b, s_b, dx_b}, {t, x_t, s_t, dx_t}, {p, x_p, s_p, dx_p}, width}, threads);
}

void square_sums_backward_bf16(const float* dsums, const uint16_t* x, uint16_t* dx, int64_t b, int64_t t, int64_t p, int64_t width,
                               int64_t s_b, int64_t s_t, int64_t s_p, int64_t x_b, int64_t x_t, int64_t x_p, int64_t dx_b, int64_t dx_t,
                               int64_t dx_p, int64_t threads) {
  backward(dsums, x, dx, {{b, x_b, s_b, dx_b}, {t, x_t, s_t, dx_t}, {p, x_p, s_p, dx_p}, width}, threads);
}
}

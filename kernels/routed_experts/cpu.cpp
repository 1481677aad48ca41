// SPDX-License-Identifier: Apache-2.0
// Routed experts: the pairs (row, choice) are sorted by token and expert, and each group of them is a few small products whose layers stand
// in the cache. All is computed in float32. A row's experts are summed in their order and a group's rows in theirs, whoever does it.
#include "native.h"

#include <memory>

using namespace native;

namespace {

constexpr int64_t kBlock = 64;  // pairs whose layers are in the cache together
constexpr int64_t kRows = 256;  // at most so many rows of a task, whose sums are in the cache too

// What a thread works with; kept from task to task.
struct Room {
  std::vector<float> x, dy, inner, hidden, dhidden, out, weight_in, weight_out, dweight_in, dweight_out, dbias, sums;
};

thread_local Room own;

float* zeros(std::vector<float>& buffer, int64_t count) {
  buffer.assign(size_t(count), 0.0f);
  return buffer.data();
}

float widened(float x) { return x; }
float widened(int8_t x) { return float(x); }
struct Float8 {  // e4m3: four bits of exponent, whose bias is 7, and three digits
  uint8_t bits;
};
float widened(Float8 x) {
  const uint32_t digits = x.bits & 127u, wide_bits = (digits << 20) + (120u << 23);
  float size;
  std::memcpy(&size, &wide_bits, sizeof size);
  size = digits < 8u ? 2.0f * (size - 0x1p-7f) : size;  // the lowest exponent has no leading one
  return x.bits & 128u ? -size : size;
}
float widened(uint16_t x) {  // bfloat16
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// A row with zeros up to a whole vector.
template <class T>
void widen(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
  std::fill(to + count, to + padded(count), 0.0f);
}

template <class T>
void narrow(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kWidth) store(to + i, load(from + i, count - i), count - i);
}

void add(const float* from, int64_t count, float* to) {  // of whole vectors
  for (int64_t i = 0; i < count; i += kWidth) store(to + i, load(to + i) + load(from + i));
}

// A matrix with zeros up to whole vectors in its rows: itself where it is one already.
template <class W>
const float* packed(const W* from, int64_t rows, int64_t columns, std::vector<float>& buffer) {
  if constexpr (sizeof(W) == sizeof(float))
    if (columns % kWidth == 0) return from;
  float* to = room(buffer, rows * padded(columns));
  for (int64_t row = 0; row < rows; ++row) widen(from + row * columns, columns, to + row * padded(columns));
  return to;
}

// Its transpose, [columns, padded rows].
template <class W>
const float* packed_transpose(const W* from, int64_t rows, int64_t columns, std::vector<float>& buffer) {
  float* to = room(buffer, columns * padded(rows));
  for (int64_t first = 0; first < rows; first += kWidth)
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t row = first; row < first + kWidth; ++row)
        to[column * padded(rows) + row] = row < rows ? widened(from[row * columns + column]) : 0.0f;
  return to;
}

// Columns scaled and shifted, by nothing where there is none; what belongs to a group is its part of all.
template <class T>
void adjust(float* rows, int64_t count, int64_t columns, int64_t group, const float* scales, const T* shifts) {
  if (!scales && !shifts) return;
  for (float* end = rows + count * padded(columns); rows < end; rows += padded(columns))
    for (int64_t i = 0, at = group * columns; i < columns; i += kWidth) {
      const vf scale = scales ? load(scales + at + i, columns - i) : broadcast(1.0f);
      store(rows + i, load(rows + i) * scale + (shifts ? load(shifts + at + i, columns - i) : vf{}));
    }
}

// A value of the hidden layer, and its derivatives by both halves of the inner one (GELU has but one).
struct Activation {
  vf value, slope, up_slope;
};

// Of the normal distribution's two sides the smaller one is the bell times a polynomial in (|x| - 3) / (|x| + 3), fitted to eight digits.
// Beyond 14 nothing is left of it.
constexpr float kSide[] = {5.367187987e-05f, 1.155437785e-04f,  -3.394848900e-04f, -9.837584803e-04f, 2.904556226e-03f,
                           6.132070441e-03f, -4.621329159e-02f, 1.232250333e-01f,  -2.064026147e-01f, 1.215139478e-01f};

inline Activation gelu(vf x) {
  const vf distance = x < 0.0f ? -x : x, size = distance > broadcast(14.0f) ? broadcast(14.0f) : distance;
  const vf u = (size - 3.0f) / (size + 3.0f), bell = exp(-0.5f * size * size);
  vf side{};
  for (const float factor : kSide) side = side * u + factor;
  side *= bell;
  const vf below = x < 0.0f ? side : 1.0f - side;
  return {x * below, below + x * bell * 0.398942280401432678f, vf{}};
}

inline Activation swiglu(vf gate, vf up) {
  const vf open = sigmoid(gate), silu = gate * open;
  return {silu * up, up * (open + silu * (1.0f - open)), silu};
}

// Both ways. W is T, or a byte with scales of its columns. The pairs stand in `order`, their groups begin at `offsets`. `start` is what sums
// start from, or backward dy; `sums` is y, or dx; `kept` [pairs, F] is the inner layer, written forward and read backward, or null.
template <class T, class W>
struct Experts {
  struct Rows {  // [T, B, D] with D together
    const T* data;
    int64_t token_stride, row_stride;
    const T* at(int64_t token, int64_t row) const { return data + token * token_stride + row * row_stride; }
  };

  int64_t tokens, batch, dim, width, hidden, experts, choices, is_gelu, threads;
  Rows x, start;
  const W *weight_in, *weight_out;
  const T *gates, *bias;
  const float *scale_in, *scale_out;
  const int64_t *order, *offsets;
  T *kept, *sums, *dweight_in, *dweight_out, *dgates, *dbias;
  int64_t dims = padded(dim), widths = padded(width), hiddens = padded(hidden), groups = tokens * experts, pairs = tokens * batch * choices;

  int64_t row(int64_t pair) const { return order[pair] / choices % batch; }

  Activation activated(const float* inner, int64_t i) const {
    const vf first = load(inner + i, hidden - i);
    return is_gelu ? gelu(first) : swiglu(first, load(inner + hidden + i, hidden - i));
  }

  // The rows of a block of pairs, [count, dims].
  float* gathered(const Rows& rows, int64_t group, int64_t begin, int64_t count, std::vector<float>& buffer) const {
    float* to = room(buffer, kBlock * dims);
    for (int64_t i = 0; i < count; ++i) widen(rows.at(group / experts, row(begin + i)), dim, to + i * dims);
    return to;
  }

  // Their inner layer, [count, widths].
  float* form_inner(const float* own_x, const float* weight, int64_t group, int64_t count) const {
    float* inner = room(own.inner, kBlock * widths);
    product({own_x, dims, 1}, weight, widths, inner, widths, count, widths, dim, false);
    adjust(inner, count, width, group, scale_in, bias);
    return inner;
  }

  // For every row the sum over its experts on top of `onto`. A task is some of a token's rows, so few only as the threads need.
  // `prepare(group)` gives what forms the outputs [count, dims] of a block of the group's pairs: `form(begin, count)`.
  template <class Prepare>
  void sum_experts(const Rows& onto, Prepare prepare) const {
    const int64_t wanted = threads > 1 ? (2 * threads + tokens - 1) / std::max<int64_t>(tokens, 1) : 1;
    const int64_t parts = std::max(std::min(wanted, (batch + 7) / 8), (batch + kRows - 1) / kRows);
    parallel_for(tokens * parts, threads, [&](int64_t task) {
      const int64_t token = task / parts, first = batch * (task % parts) / parts, last = batch * (task % parts + 1) / parts;
      float* total = zeros(own.sums, (last - first) * dims);
      for (int64_t b = first; onto.data && b < last; ++b) widen(onto.at(token, b), dim, total + (b - first) * dims);
      for (int64_t group = token * experts; group < (token + 1) * experts; ++group) {
        const auto pair_from = [&](int64_t b) {
          return std::lower_bound(order + offsets[group], order + offsets[group + 1], (token * batch + b) * choices) - order;
        };
        const int64_t begin = pair_from(first), end = pair_from(last);
        if (begin == end) continue;
        const auto form = prepare(group);
        for (int64_t block = begin; block < end; block += kBlock) {
          const int64_t count = std::min(kBlock, end - block);
          const float* out = form(block, count);
          for (int64_t i = 0; i < count; ++i) add(out + i * dims, dims, total + (row(block + i) - first) * dims);
        }
      }
      for (int64_t b = first; b < last; ++b) narrow(total + (b - first) * dims, dim, sums + (token * batch + b) * dim);
    });
  }

  void forward() const {
    if (kept) std::fill(kept + offsets[groups] * width, kept + pairs * width, T(0));
    sum_experts(start, [&](int64_t group) {
      const float* w_in = packed(weight_in + group * dim * width, dim, width, own.weight_in);
      const float* w_out = packed(weight_out + group * hidden * dim, hidden, dim, own.weight_out);
      return [=](int64_t begin, int64_t count) {
        const float* inner = form_inner(gathered(x, group, begin, count, own.x), w_in, group, count);
        float *act = room(own.hidden, kBlock * hiddens), *out = room(own.out, kBlock * dims);
        for (int64_t i = 0; i < count; ++i, inner += widths) {
          if (kept) narrow(inner, width, kept + (begin + i) * width);
          const float gate = widened(gates[order[begin + i]]);
          for (int64_t j = 0; j < hidden; j += kWidth) store(act + i * hiddens + j, activated(inner, j).value * gate);
        }
        product({act, hiddens, 1}, w_out, dims, out, dims, count, dims, hidden, false);
        adjust<T>(out, count, dim, group, scale_out, nullptr);
        return out;
      };
    });
  }

  // From the gradient of the gated hidden layer that of the inner one, and the gated layer itself. Returns the gate's gradient.
  float activate_backward(const float* inner, float gate, const float* dhidden, float* act, float* dinner) const {
    vf share{};
    for (int64_t i = 0; i < hidden; i += kWidth) {
      const Activation at = activated(inner, i);
      const vf raw = load(dhidden + i, hidden - i), pull = raw * gate;
      store(act + i, at.value * gate);
      store(dinner + i, pull * at.slope, hidden - i);
      if (!is_gelu) store(dinner + hidden + i, pull * at.up_slope, hidden - i);
      share += raw * at.value;
    }
    std::fill(dinner + width, dinner + widths, 0.0f);
    return sum(share);
  }

  // The gradients of a group's weights, bias and gates, and in `dinner` [pairs, widths] that of the inner layer.
  void backward_group(int64_t group, float* dinner) const {
    const float* w_in = kept ? nullptr : packed(weight_in + group * dim * width, dim, width, own.weight_in);
    const float* w_out = packed_transpose(weight_out + group * hidden * dim, hidden, dim, own.weight_out);
    float *dw_in = zeros(own.dweight_in, dim * widths), *dw_out = zeros(own.dweight_out, hidden * dims), *db = zeros(own.dbias, widths);
    float *act = room(own.hidden, kBlock * hiddens), *dhidden = room(own.dhidden, kBlock * hiddens);
    for (int64_t begin = offsets[group], end = offsets[group + 1]; begin < end; begin += kBlock) {
      const int64_t count = std::min(kBlock, end - begin);
      const float *own_x = gathered(x, group, begin, count, own.x), *own_dy = gathered(start, group, begin, count, own.dy);
      float* inner = kept ? room(own.inner, kBlock * widths) : form_inner(own_x, w_in, group, count);
      product({own_dy, dims, 1}, w_out, hiddens, dhidden, hiddens, count, hiddens, dim, false);
      for (int64_t i = 0; i < count; ++i) {
        if (kept) widen(kept + (begin + i) * width, width, inner + i * widths);
        const int64_t place = order[begin + i], at = i * hiddens;
        float* pull = dinner + (begin + i) * widths;
        const float share = activate_backward(inner + i * widths, widened(gates[place]), dhidden + at, act + at, pull);
        narrow(&share, 1, dgates + place);
        add(pull, widths, db);
      }
      product({act, 1, hiddens}, own_dy, dims, dw_out, dims, hidden, dims, count, true);
      product({own_x, 1, dims}, dinner + begin * widths, widths, dw_in, widths, dim, widths, count, true);
    }
    for (int64_t i = 0; i < dim; ++i) narrow(dw_in + i * widths, width, dweight_in + (group * dim + i) * width);
    for (int64_t i = 0; i < hidden; ++i) narrow(dw_out + i * dims, dim, dweight_out + (group * hidden + i) * dim);
    if (dbias) narrow(db, width, dbias + group * width);
  }

  void backward() const {
    const std::unique_ptr<float[]> dinner(new float[size_t(offsets[groups] * widths)]);
    for (int64_t pair = offsets[groups]; pair < pairs; ++pair) dgates[order[pair]] = T(0);
    parallel_for(groups, threads, [&](int64_t group) { backward_group(group, dinner.get()); });
    sum_experts({}, [&](int64_t group) {
      const float* w_in = packed_transpose(weight_in + group * dim * width, dim, width, own.weight_in);
      return [=, pulls = dinner.get()](int64_t begin, int64_t count) {
        float* out = room(own.out, kBlock * dims);
        product({pulls + begin * widths, widths, 1}, w_in, dims, out, dims, count, dims, width, false);
        return out;
      };
    });
  }
};

}  // namespace

extern "C" {

// The places of chosen [T, each] by token and expert, in their old order within a group, those without an expert last; and where the groups
// begin, [T * E + 1]. Returns 1, with neither done, where a choice is beyond the experts.
int64_t sort_pairs(const int64_t* chosen, int64_t tokens, int64_t each, int64_t experts, int64_t* order, int64_t* offsets) {
  const int64_t groups = tokens * experts;
  const auto group_of = [&](int64_t place) { return chosen[place] < 0 ? groups : place / each * experts + chosen[place]; };
  std::vector<int64_t> next(size_t(groups + 2), 0);
  for (int64_t place = 0; place < tokens * each; ++place) {
    if (chosen[place] >= experts) return 1;
    ++next[size_t(group_of(place) + 1)];
  }
  for (size_t group = 1; group < next.size(); ++group) next[group] += next[group - 1];
  std::copy_n(next.begin(), groups + 1, offsets);
  for (int64_t place = 0; place < tokens * each; ++place) order[next[size_t(group_of(place))]++] = place;
  return 0;
}

// Of bfloat16 (`half`) or float32; with weights such as x (`format` 0), int8 (1) or float8 (2); forward, or `back`, of which weights of a byte
// are no part.
void routed_experts(int64_t half, int64_t format, int64_t back, int64_t tokens, int64_t batch, int64_t dim, int64_t width, int64_t hidden,
                    int64_t experts, int64_t choices, int64_t gelu, int64_t threads, const void* x, int64_t x_token, int64_t x_row,
                    const void* start, int64_t start_token, int64_t start_row, const void* weight_in, const void* weight_out,
                    const void* gates, const void* bias, const float* scale_in, const float* scale_out, const int64_t* order,
                    const int64_t* offsets, void* kept, void* sums, void* dweight_in, void* dweight_out, void* dgates, void* dbias) {
  const auto run = [&](auto of_x, auto of_weight) {
    using T = decltype(of_x);
    using W = decltype(of_weight);
    const auto in = [](const void* data) { return static_cast<const T*>(data); };
    const auto out = [](void* data) { return static_cast<T*>(data); };
    const Experts<T, W> all{tokens, batch, dim, width, hidden, experts, choices, gelu, threads, {in(x), x_token, x_row},
                            {in(start), start_token, start_row}, static_cast<const W*>(weight_in), static_cast<const W*>(weight_out),
                            in(gates), in(bias), scale_in, scale_out, order, offsets, out(kept), out(sums), out(dweight_in),
                            out(dweight_out), out(dgates), out(dbias)};
    back ? all.backward() : all.forward();
  };
  const auto choose = [&](auto of_x) { format == 1 ? run(of_x, int8_t()) : format ? run(of_x, Float8()) : run(of_x, of_x); };
  half ? choose(uint16_t()) : choose(float());
}
}

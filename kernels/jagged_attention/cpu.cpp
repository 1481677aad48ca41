// SPDX-License-Identifier: Apache-2.0
// Attention inside jagged rows: a task is one head of one row, whose scores for a block of queries stay in the cache. Keys behind the last
// one that a block sees are never multiplied with; per token and head one log-sum-exp is kept, and for the SiLU form nothing.
#include "native.h"

using namespace native;

namespace {

constexpr int64_t kQueries = 32;  // of a block

enum Mask { kCausal, kGrouped, kGroupedApart };

struct Rule {
  bool softmax;
  Mask mask;
  int64_t group;
  float divisor;

  // Query i sees the keys before this one, and itself.
  int64_t seen(int64_t i, int64_t length) const {
    if (mask == kCausal) return i + 1;
    const int64_t first = i / group * group;
    return mask == kGrouped ? std::min(first + group, length) : first;
  }
};

// Where the tokens lie: [S, H, e].
struct Layout {
  int64_t heads, width;
  int64_t at(int64_t token, int64_t head) const { return (token * heads + head) * width; }
};

// One head of a row as the products want it.
struct Packed {
  int64_t length = 0, width = 0, keys = 0, columns = 0;
  std::vector<float> across;  // [e, keys]: one column for each token
  std::vector<float> along;   // [L, columns]: one row for each token

  void take(const float* x, const Layout& layout, int64_t first, int64_t count, int64_t head, bool with_across, bool with_along) {
    length = count, width = layout.width, keys = padded(count), columns = padded(layout.width);
    if (with_across) across.assign(size_t(width * keys), 0.0f);
    if (with_along) along.assign(size_t(length * columns), 0.0f);
    for (int64_t token = 0; token < length; ++token) {
      const float* own = x + layout.at(first + token, head);
      if (with_across)
        for (int64_t i = 0; i < width; ++i) across[size_t(i * keys + token)] = own[i];
      if (with_along) std::copy_n(own, width, along.data() + token * columns);
    }
  }
};

// rab by place: number [j - i + L - 1] stands between query i and key j, so that a query's are together. A vector more can be read.
void unroll_bias(const float* bias, int64_t distances, int64_t length, std::vector<float>& by_place) {
  by_place.assign(size_t(2 * length - 1 + kWidth), 0.0f);
  for (int64_t t = 0; t < 2 * length - 1; ++t) by_place[size_t(t)] = bias[std::clamp<int64_t>(length - 1 - t, 0, distances - 1)];
}

// What a thread works with; kept from task to task.
struct Room {
  Packed q, k, v, dy;
  std::vector<float> bias, scores, pulls, out, dbias, dk, dv;
};

// The scores of the queries [begin, end) with the first `limit` keys, in room.scores [end - begin, wide].
void score(Room& room, bool biased, int64_t begin, int64_t end, int64_t wide) {
  const int64_t length = room.k.length;
  room.scores.resize(size_t(kQueries * room.k.keys));
  product({room.q.along.data() + begin * room.q.columns, room.q.columns, 1}, room.k.across.data(), room.k.keys, room.scores.data(), wide,
          end - begin, wide, room.k.width, false);
  const vf scale = broadcast(1.0f / std::sqrt(float(room.k.width)));
  for (int64_t i = begin; i < end; ++i) {
    float* own = room.scores.data() + (i - begin) * wide;
    const float* rab = biased ? room.bias.data() + length - 1 - i : nullptr;
    for (int64_t j = 0; j < wide; j += kWidth) {
      vf value = load(own + j) * scale;
      if (rab) value += load(rab + j);
      store(own + j, value);
    }
  }
}

// Calls each(j, vector, mask) over the keys that query i sees; what lies between and behind them is set to `outside`.
template <class Each>
void over_seen(float* own, int64_t seen, int64_t itself, int64_t wide, Each each) {
  const vi first = counting();
  for (int64_t j = 0; j < wide; j += kWidth) {
    const vi place = first + int32_t(j);
    store(own + j, each(j, load(own + j), vi((place < int32_t(seen)) | (place == int32_t(itself)))));
  }
}

// Scores to weights, in place; returns the log-sum-exp (softmax).
float weigh(float* own, const Rule& rule, int64_t seen, int64_t itself, int64_t wide) {
  if (!rule.softmax) {
    const float share = 1.0f / rule.divisor;
    over_seen(own, seen, itself, wide, [&](int64_t, vf s, vi here) { return here ? s * sigmoid(s) * share : vf{}; });
    return 0;
  }
  vf most = broadcast(-kInfinity), total{};
  over_seen(own, seen, itself, wide, [&](int64_t, vf s, vi here) {
    s = here ? s : broadcast(-kInfinity);
    most = max(most, s);
    return s;
  });
  const float limit = largest(most);
  for (int64_t j = 0; j < wide; j += kWidth) {
    const vf weight = exp(load(own + j) - limit);
    total += weight;
    store(own + j, weight);
  }
  const float all = sum(total);
  for (int64_t j = 0; j < wide; j += kWidth) store(own + j, load(own + j) / all);
  return limit + std::log(all);
}

int64_t last_seen(const Rule& rule, int64_t end, int64_t length) { return std::max(rule.seen(end - 1, length), end); }

void forward(Room& room, const float* q, const float* k, const float* v, const float* bias, int64_t distances, const Layout& layout,
             const Rule& rule, int64_t first, int64_t length, int64_t head, float* y, float* lse) {
  room.q.take(q, layout, first, length, head, false, true);
  room.k.take(k, layout, first, length, head, true, false);
  room.v.take(v, layout, first, length, head, false, true);
  if (bias) unroll_bias(bias, distances, length, room.bias);
  room.out.resize(size_t(kQueries * room.v.columns));
  for (int64_t begin = 0; begin < length; begin += kQueries) {
    const int64_t end = std::min(begin + kQueries, length), limit = last_seen(rule, end, length), wide = padded(limit);
    score(room, bias, begin, end, wide);
    for (int64_t i = begin; i < end; ++i) {
      const float found = weigh(room.scores.data() + (i - begin) * wide, rule, rule.seen(i, length), i, wide);
      if (rule.softmax) lse[i] = found;
    }
    product({room.scores.data(), wide, 1}, room.v.along.data(), room.v.columns, room.out.data(), room.v.columns, end - begin, room.v.columns,
            limit, false);
    for (int64_t i = begin; i < end; ++i)
      std::copy_n(room.out.data() + (i - begin) * room.v.columns, layout.width, y + layout.at(first + i, head));
  }
}

// Scores to weights, and the gradients of the weights (room.pulls) to those of the scores, both in place.
void weigh_backward(float* own, float* pull, const Rule& rule, float lse, int64_t seen, int64_t itself, int64_t wide) {
  if (rule.softmax) {
    vf inner{};
    over_seen(own, seen, itself, wide, [&](int64_t j, vf s, vi here) {
      const vf weight = here ? exp(s - lse) : vf{};
      inner += here ? weight * load(pull + j) : vf{};
      return weight;
    });
    const float mean = sum(inner);
    for (int64_t j = 0; j < wide; j += kWidth) store(pull + j, load(own + j) * (load(pull + j) - mean));
    return;
  }
  const float share = 1.0f / rule.divisor;
  over_seen(own, seen, itself, wide, [&](int64_t j, vf s, vi here) {
    const vf open = sigmoid(s);
    store(pull + j, here ? load(pull + j) * open * (1.0f + s * (1.0f - open)) * share : vf{});
    return here ? s * open * share : vf{};
  });
}

struct Gradients {
  float *q, *k, *v;
};

void put(const std::vector<float>& from, int64_t columns, float scale, const Layout& layout, int64_t first, int64_t count, int64_t head, float* to) {
  for (int64_t token = 0; token < count; ++token)
    for (int64_t i = 0; i < layout.width; ++i) to[layout.at(first + token, head) + i] = from[size_t(token * columns + i)] * scale;
}

void backward(Room& room, const float* dy, const float* q, const float* k, const float* v, const float* bias, int64_t distances,
              const Layout& layout, const Rule& rule, int64_t first, int64_t length, int64_t head, const float* lse, const Gradients& to,
              float* dbias) {
  const float scale = 1.0f / std::sqrt(float(layout.width));
  room.q.take(q, layout, first, length, head, false, true);
  room.k.take(k, layout, first, length, head, true, true);
  room.v.take(v, layout, first, length, head, true, false);
  room.dy.take(dy, layout, first, length, head, false, true);
  const int64_t columns = room.q.columns;
  if (bias) {
    unroll_bias(bias, distances, length, room.bias);
    room.dbias.assign(size_t(2 * length - 1 + kWidth), 0.0f);
  }
  room.pulls.resize(size_t(kQueries * room.k.keys));
  room.out.resize(size_t(kQueries * columns));
  room.dk.assign(size_t(length * columns), 0.0f);
  room.dv.assign(size_t(length * columns), 0.0f);
  for (int64_t begin = 0; begin < length; begin += kQueries) {
    const int64_t end = std::min(begin + kQueries, length), count = end - begin, limit = last_seen(rule, end, length), wide = padded(limit);
    score(room, bias, begin, end, wide);
    product({room.dy.along.data() + begin * columns, columns, 1}, room.v.across.data(), room.v.keys, room.pulls.data(), wide, count, wide,
            layout.width, false);
    for (int64_t i = begin; i < end; ++i) {
      float *own = room.scores.data() + (i - begin) * wide, *pull = room.pulls.data() + (i - begin) * wide;
      weigh_backward(own, pull, rule, rule.softmax ? lse[i] : 0.0f, rule.seen(i, length), i, wide);
      if (bias)
        for (int64_t j = 0; j < limit; j += kWidth) {
          float* place = room.dbias.data() + length - 1 - i + j;
          store(place, load(place) + load(pull + j));  // behind the last key that is seen, pulls are zero
        }
    }
    product({room.scores.data(), 1, wide}, room.dy.along.data() + begin * columns, columns, room.dv.data(), columns, limit, columns, count, true);
    product({room.pulls.data(), 1, wide}, room.q.along.data() + begin * columns, columns, room.dk.data(), columns, limit, columns, count, true);
    product({room.pulls.data(), wide, 1}, room.k.along.data(), columns, room.out.data(), columns, count, columns, limit, false);
    put(room.out, columns, scale, layout, first + begin, count, head, to.q);
  }
  put(room.dk, columns, scale, layout, first, length, head, to.k);
  put(room.dv, columns, 1.0f, layout, first, length, head, to.v);
  if (bias)
    for (int64_t t = 0; t < 2 * length - 1; ++t) dbias[std::clamp<int64_t>(length - 1 - t, 0, distances - 1)] += room.dbias[size_t(t)];
}

Rule rule_of(int64_t softmax, int64_t mask, int64_t group, double divisor) { return {softmax != 0, Mask(mask), group, float(divisor)}; }

}  // namespace

extern "C" {

// q, k, v, y [S, H, e]; offsets [B + 1]; bias [H or 1, D] or null; lse [H, S].
void jagged_attention(const float* q, const float* k, const float* v, const int64_t* offsets, const float* bias, int64_t rows, int64_t heads,
                      int64_t width, int64_t biases, int64_t distances, int64_t softmax, int64_t mask, int64_t group, double divisor,
                      int64_t threads, float* y, float* lse) {
  const Layout layout{heads, width};
  const Rule rule = rule_of(softmax, mask, group, divisor);
  const int64_t tokens = offsets[rows];
  parallel_for(rows * heads, threads, [&](int64_t task) {
    static thread_local Room room;
    const int64_t row = task / heads, head = task % heads, first = offsets[row];
    const float* own = bias ? bias + (biases > 1 ? head : 0) * distances : nullptr;
    if (offsets[row + 1] > first)
      forward(room, q, k, v, own, distances, layout, rule, first, offsets[row + 1] - first, head, y, lse + head * tokens + first);
  });
}

// dbias [min(rows, parts), H, D]: the shares of the bias's gradient; a part has every so manieth row.
void jagged_attention_backward(const float* dy, const float* q, const float* k, const float* v, const int64_t* offsets, const float* bias,
                               const float* lse, int64_t rows, int64_t heads, int64_t width, int64_t biases, int64_t distances,
                               int64_t softmax, int64_t mask, int64_t group, double divisor, int64_t threads, float* dq, float* dk,
                               float* dv, float* dbias, int64_t most_parts) {
  const Layout layout{heads, width};
  const Rule rule = rule_of(softmax, mask, group, divisor);
  const int64_t tokens = offsets[rows], parts = std::min(rows, most_parts);
  parallel_for(parts * heads, threads, [&](int64_t task) {
    static thread_local Room room;
    const int64_t part = task / heads, head = task % heads;
    const float* own = bias ? bias + (biases > 1 ? head : 0) * distances : nullptr;
    float* share = bias ? dbias + (part * heads + head) * distances : nullptr;
    if (share) std::fill_n(share, distances, 0.0f);
    for (int64_t row = part; row < rows; row += parts) {
      const int64_t first = offsets[row];
      if (offsets[row + 1] > first)
        backward(room, dy, q, k, v, own, distances, layout, rule, first, offsets[row + 1] - first, head, lse + head * tokens + first,
                 {dq, dk, dv}, share);
    }
  });
}
}

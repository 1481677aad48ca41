// SPDX-License-Identifier: Apache-2.0
// Attention inside jagged rows: a task is one head of one row, whose scores for a block of queries stay in the cache. Keys behind the last
// one that a block sees are never multiplied with; per token and head one log-sum-exp is kept, and for the SiLU form nothing.
#include "native.h"

using namespace native;

namespace {

constexpr int64_t kQueries = 32;  // of a block

enum Mask { kCausal, kGrouped, kPrefix };

struct Rule {
  bool softmax;
  Mask mask;
  int64_t group;
  float divisor;
  const int64_t* prefix;  // [L] of the row that is at hand

  Rule of_row(int64_t first) const { return {softmax, mask, group, divisor, prefix ? prefix + first : nullptr}; }

  // Query i sees the keys before this one, and itself.
  int64_t seen(int64_t i, int64_t length) const {
    if (mask == kCausal) return i + 1;
    return mask == kGrouped ? std::min(i / group * group + group, length) : prefix[i];
  }
};

// The keys that the queries [begin, end) multiply with: those before `before`, and from `begin` to `limit`. What lies between, they do
// not see. They stand in columns one after another, without the gap.
struct Keys {
  int64_t before, begin, limit;

  int64_t columns() const { return before + limit - begin; }
  int64_t at(int64_t column) const { return column < before ? column : column - before + begin; }

  // Calls each(column, key, count) for what lies together.
  template <class Each>
  void spans(Each each) const {
    if (before == begin) return each(0, 0, limit);
    if (before) each(0, 0, before);
    each(before, begin, limit - begin);
  }
};

Keys keys_of(const Rule& rule, int64_t begin, int64_t end, int64_t length) {
  if (rule.mask != kPrefix) return {begin, begin, std::max(rule.seen(end - 1, length), end)};
  const int64_t most = *std::max_element(rule.prefix + begin, rule.prefix + end);
  return {std::min(padded(most), begin), begin, end};
}

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

// Products of `count` rows from `begin` on with all keys, in `out` [count, wide].
void with_keys(const Packed& rows, const Packed& packed, const Keys& keys, int64_t begin, int64_t count, int64_t wide, std::vector<float>& out) {
  out.resize(size_t(kQueries * packed.keys));
  keys.spans([&](int64_t column, int64_t key, int64_t here) {
    product({rows.along.data() + begin * rows.columns, rows.columns, 1}, packed.across.data() + key, packed.keys, out.data() + column, wide, count,
            padded(here), packed.width, false);
  });
}

// Weights [count, wide] times what stands at the keys, in `out` [count, columns].
void of_keys(const std::vector<float>& weights, const Packed& packed, const Keys& keys, int64_t count, int64_t wide, std::vector<float>& out) {
  out.resize(size_t(kQueries * packed.columns));
  keys.spans([&](int64_t column, int64_t key, int64_t here) {
    product({weights.data() + column, wide, 1}, packed.along.data() + key * packed.columns, packed.columns, out.data(), packed.columns, count,
            packed.columns, here, column > 0);
  });
}

// Adds the weights [count, wide] times `count` rows from `begin` on to `out` [L, columns], at the keys.
void to_keys(const std::vector<float>& weights, const Packed& rows, const Keys& keys, int64_t begin, int64_t count, int64_t wide,
             std::vector<float>& out) {
  keys.spans([&](int64_t column, int64_t key, int64_t here) {
    product({weights.data() + column, 1, wide}, rows.along.data() + begin * rows.columns, rows.columns, out.data() + key * rows.columns,
            rows.columns, here, rows.columns, count, true);
  });
}

// The scores of the queries [begin, end) with all keys, in room.scores [end - begin, wide].
void score(Room& room, bool biased, const Keys& keys, int64_t begin, int64_t end, int64_t wide) {
  const int64_t length = room.k.length;
  with_keys(room.q, room.k, keys, begin, end - begin, wide, room.scores);
  const vf scale = broadcast(1.0f / std::sqrt(float(room.k.width)));
  for (int64_t i = begin; i < end; ++i) {
    float* own = room.scores.data() + (i - begin) * wide;
    const float* rab = biased ? room.bias.data() + length - 1 - i : nullptr;
    for (int64_t j = 0; j < wide; j += kWidth) {
      vf value = load(own + j) * scale;
      if (rab) value += load(rab + keys.at(j));
      store(own + j, value);
    }
  }
}

// Calls each(j, vector, mask) over the keys that query i sees; what lies between and behind them is set to `outside`.
template <class Each>
void over_seen(float* own, const Keys& keys, int64_t seen, int64_t itself, int64_t wide, Each each) {
  const vi first = counting();
  for (int64_t j = 0; j < wide; j += kWidth) {
    const vi place = first + int32_t(keys.at(j));
    store(own + j, each(j, load(own + j), vi((place < int32_t(seen)) | (place == int32_t(itself)))));
  }
}

// Scores to weights, in place; returns the log-sum-exp (softmax).
float weigh(float* own, const Rule& rule, const Keys& keys, int64_t seen, int64_t itself, int64_t wide) {
  if (!rule.softmax) {
    const float share = 1.0f / rule.divisor;
    over_seen(own, keys, seen, itself, wide, [&](int64_t, vf s, vi here) { return here ? s * sigmoid(s) * share : vf{}; });
    return 0;
  }
  vf most = broadcast(-kInfinity), total{};
  over_seen(own, keys, seen, itself, wide, [&](int64_t, vf s, vi here) {
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

void forward(Room& room, const float* q, const float* k, const float* v, const float* bias, int64_t distances, const Layout& layout,
             const Rule& rule, int64_t first, int64_t length, int64_t head, float* y, float* lse) {
  room.q.take(q, layout, first, length, head, false, true);
  room.k.take(k, layout, first, length, head, true, false);
  room.v.take(v, layout, first, length, head, false, true);
  if (bias) unroll_bias(bias, distances, length, room.bias);
  for (int64_t begin = 0; begin < length; begin += kQueries) {
    const int64_t end = std::min(begin + kQueries, length);
    const Keys keys = keys_of(rule, begin, end, length);
    const int64_t wide = padded(keys.columns());
    score(room, bias, keys, begin, end, wide);
    for (int64_t i = begin; i < end; ++i) {
      const float found = weigh(room.scores.data() + (i - begin) * wide, rule, keys, rule.seen(i, length), i, wide);
      if (rule.softmax) lse[i] = found;
    }
    of_keys(room.scores, room.v, keys, end - begin, wide, room.out);
    for (int64_t i = begin; i < end; ++i)
      std::copy_n(room.out.data() + (i - begin) * room.v.columns, layout.width, y + layout.at(first + i, head));
  }
}

// Scores to weights, and the gradients of the weights (room.pulls) to those of the scores, both in place.
void weigh_backward(float* own, float* pull, const Rule& rule, const Keys& keys, float lse, int64_t seen, int64_t itself, int64_t wide) {
  if (rule.softmax) {
    vf inner{};
    over_seen(own, keys, seen, itself, wide, [&](int64_t j, vf s, vi here) {
      const vf weight = here ? exp(s - lse) : vf{};
      inner += here ? weight * load(pull + j) : vf{};
      return weight;
    });
    const float mean = sum(inner);
    for (int64_t j = 0; j < wide; j += kWidth) store(pull + j, load(own + j) * (load(pull + j) - mean));
    return;
  }
  const float share = 1.0f / rule.divisor;
  over_seen(own, keys, seen, itself, wide, [&](int64_t j, vf s, vi here) {
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
  room.dk.assign(size_t(length * columns), 0.0f);
  room.dv.assign(size_t(length * columns), 0.0f);
  for (int64_t begin = 0; begin < length; begin += kQueries) {
    const int64_t end = std::min(begin + kQueries, length), count = end - begin;
    const Keys keys = keys_of(rule, begin, end, length);
    const int64_t wide = padded(keys.columns());
    score(room, bias, keys, begin, end, wide);
    with_keys(room.dy, room.v, keys, begin, count, wide, room.pulls);
    for (int64_t i = begin; i < end; ++i) {
      float *own = room.scores.data() + (i - begin) * wide, *pull = room.pulls.data() + (i - begin) * wide;
      weigh_backward(own, pull, rule, keys, rule.softmax ? lse[i] : 0.0f, rule.seen(i, length), i, wide);
      if (bias)
        for (int64_t j = 0; j < keys.columns(); j += kWidth) {
          float* place = room.dbias.data() + length - 1 - i + keys.at(j);
          store(place, load(place) + load(pull + j));  // behind the last key that is seen, pulls are zero
        }
    }
    to_keys(room.scores, room.dy, keys, begin, count, wide, room.dv);
    to_keys(room.pulls, room.q, keys, begin, count, wide, room.dk);
    of_keys(room.pulls, room.k, keys, count, wide, room.out);
    put(room.out, columns, scale, layout, first + begin, count, head, to.q);
  }
  put(room.dk, columns, scale, layout, first, length, head, to.k);
  put(room.dv, columns, 1.0f, layout, first, length, head, to.v);
  if (bias)
    for (int64_t t = 0; t < 2 * length - 1; ++t) dbias[std::clamp<int64_t>(length - 1 - t, 0, distances - 1)] += room.dbias[size_t(t)];
}

Rule rule_of(int64_t softmax, int64_t mask, int64_t group, double divisor, const int64_t* seen) {
  return {softmax != 0, Mask(mask), group, float(divisor), seen};
}

}  // namespace

extern "C" {

// q, k, v, y [S, H, e]; offsets [B + 1]; bias [H or 1, D] or null; seen [S] or null; lse [H, S].
void jagged_attention(const float* q, const float* k, const float* v, const int64_t* offsets, const float* bias, int64_t rows, int64_t heads,
                      int64_t width, int64_t biases, int64_t distances, int64_t softmax, int64_t mask, int64_t group, double divisor,
                      const int64_t* seen, int64_t threads, float* y, float* lse) {
  const Layout layout{heads, width};
  const Rule rule = rule_of(softmax, mask, group, divisor, seen);
  const int64_t tokens = offsets[rows];
  parallel_for(rows * heads, threads, [&](int64_t task) {
    static thread_local Room room;
    const int64_t row = task / heads, head = task % heads, first = offsets[row];
    const float* own = bias ? bias + (biases > 1 ? head : 0) * distances : nullptr;
    if (offsets[row + 1] > first)
      forward(room, q, k, v, own, distances, layout, rule.of_row(first), first, offsets[row + 1] - first, head, y, lse + head * tokens + first);
  });
}

// dbias [min(rows, parts), H, D]: the shares of the bias's gradient; a part has every so manieth row.
void jagged_attention_backward(const float* dy, const float* q, const float* k, const float* v, const int64_t* offsets, const float* bias,
                               const float* lse, int64_t rows, int64_t heads, int64_t width, int64_t biases, int64_t distances,
                               int64_t softmax, int64_t mask, int64_t group, double divisor, const int64_t* seen, int64_t threads, float* dq,
                               float* dk, float* dv, float* dbias, int64_t most_parts) {
  const Layout layout{heads, width};
  const Rule rule = rule_of(softmax, mask, group, divisor, seen);
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
        backward(room, dy, q, k, v, own, distances, layout, rule.of_row(first), first, offsets[row + 1] - first, head, lse + head * tokens + first,
                 {dq, dk, dv}, share);
    }
  });
}
}

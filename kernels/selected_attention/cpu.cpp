// SPDX-License-Identifier: Apache-2.0
// Attention of blocks of queries to chosen keys, forward and backward.
//
// A unit is what reads one list of keys: a block of queries of one head, or of all heads that share the choice. Its keys and values are
// gathered once, a row each, in single precision. Scores have a row for each key and a column for each query, so that softmax runs down
// the columns, a vector of queries at a time, and products take keys and values as they lie. Sums over keys are taken in the list's order.
#include <utility>

#include "native.h"

using namespace native;

namespace {

constexpr int64_t kQueries = 64;  // of a chunk, whose scores are in memory at a time
constexpr int64_t kFew = 4;       // queries up to here are multiplied one by one, where a vector of them would be mostly empty

// How rows of `width` numbers lie in [B, heads, rows, width].
struct Strides {
  int64_t batch, head, row, width;
};

// As native.py lists them.
struct Sizes {
  int64_t batch, heads, key_heads, queries, keys, groups, blocks, kept, parts, threads, half;  // half: numbers are bfloat16
  Strides q, k, v, dy;
  int64_t sharing() const { return heads / key_heads; }
  int64_t apart() const { return groups == heads ? sharing() : 1; }  // choices of the query heads of a key head
  int64_t units() const { return apart() * blocks; }                 // of a key head
};

// Unit `number` of a key head; these are numbered through the batch.
struct Unit {
  const Sizes& sizes;
  int64_t batch, key_head, list;
  int64_t head, first, length;  // the first query head, the first query, and how many queries each head has
  int64_t rows;                 // queries of all its heads, head after head

  Unit(const Sizes& sizes, int64_t key_row, int64_t number) : sizes(sizes) {
    const int64_t block = number % sizes.blocks, size = (sizes.queries + sizes.blocks - 1) / sizes.blocks;
    batch = key_row / sizes.key_heads, key_head = key_row % sizes.key_heads;
    head = key_head * sizes.sharing() + number / sizes.blocks;
    first = block * size, length = std::min(size, sizes.queries - first), rows = length * sizes.sharing() / sizes.apart();
    list = (batch * sizes.groups + head * sizes.groups / sizes.heads) * sizes.blocks + block;
  }

  int64_t head_of(int64_t row) const { return head + row / length; }
  int64_t query_of(int64_t row) const { return first + row % length; }
  int64_t place_of(int64_t row) const { return (batch * sizes.heads + head_of(row)) * sizes.queries + query_of(row); }
};

struct View {
  const void* data;
  int64_t half;
  Strides by;

  // One row times a factor, with zeros up to whole vectors.
  void take(int64_t batch, int64_t head, int64_t row, float factor, float* to) const {
    const int64_t place = batch * by.batch + head * by.head + row * by.row, width = by.width;
    const auto* narrow = static_cast<const uint16_t*>(data) + place;
    const auto* wide = static_cast<const float*>(data) + place;
    for (int64_t i = 0; i < width; i += kWidth) store(to + i, (half ? load(narrow + i, width - i) : load(wide + i, width - i)) * factor);
  }
};

// Rows of a kWidth x kWidth square become its columns: rows whose numbers differ in one bit exchange the lanes that differ in it.
template <int kBit, int... kLane>
inline void turn(vf* x, std::integer_sequence<int, kLane...> lanes) {
  for (int i = 0; i < kWidth; ++i)
    if (!(i & kBit)) {
      const vf low = x[i], high = x[i + kBit];
      x[i] = vf{(kLane & kBit ? high[kLane & ~kBit] : low[kLane])...};
      x[i + kBit] = vf{(kLane & kBit ? high[kLane] : low[kLane | kBit])...};
    }
  if constexpr (kBit > 1) turn<kBit / 2>(x, lanes);
}

// A chunk of a unit's queries, or of the gradients of its results, with zeros up to whole vectors.
struct Packed {
  int64_t count = 0, wide = 0, columns = 0;
  std::vector<float> along;   // [wide, columns]: a row for each query
  std::vector<float> across;  // [columns, wide]: a column for each query
  void take(const View& x, const Unit& unit, int64_t begin, float factor) {
    count = std::min(kQueries, unit.rows - begin), wide = padded(count), columns = padded(x.by.width);
    float *rows = room(along, wide * columns), *turned = room(across, wide * columns);
    std::fill_n(rows + count * columns, (wide - count) * columns, 0.0f);
    for (int64_t row = 0; row < count; ++row)
      x.take(unit.batch, unit.head_of(begin + row), unit.query_of(begin + row), factor, rows + row * columns);
    for (int64_t row = 0; row < wide; row += kWidth)
      for (int64_t column = 0; column < columns; column += kWidth) {
        vf square[kWidth];
        for (int i = 0; i < kWidth; ++i) square[i] = load(rows + (row + i) * columns + column);
        turn<kWidth / 2>(square, std::make_integer_sequence<int, kWidth>{});
        for (int i = 0; i < kWidth; ++i) store(turned + (column + i) * wide + row, square[i]);
      }
  }
};

// What a thread works with; kept from task to task.
struct Room {
  std::vector<int32_t> places;
  std::vector<float> keys, values, scores, pulls, out, dkeys, dvalues;
  Packed q, dy;
  int32_t last[kQueries];
  float lse[kQueries], share[kQueries];
  int64_t count() const { return int64_t(places.size()); }
};

// Products of gathered rows with a chunk's, [K, wide].
void multiply(const float* rows, int64_t keys, const Packed& x, std::vector<float>& to) {
  float* found = room(to, keys * x.wide);
  if (x.count > kFew) return product({rows, x.columns, 1}, x.across.data(), x.wide, found, x.wide, keys, x.wide, x.columns, false);
  for (int64_t j = 0; j < keys; ++j) {
    vf one{};
    for (int64_t row = 0; row < x.count; ++row) {
      const float* other = x.along.data() + row * x.columns;
      vf total{};
      for (int64_t i = 0; i < x.columns; i += kWidth) total += load(rows + j * x.columns + i) * load(other + i);
      one[row] = sum(total);
    }
    store(found + j * x.wide, one);
  }
}

// Calls each(place, score) down the keys, for kWidth queries from `column` on; what a query does not read scores -inf.
template <class Each>
inline void over_keys(const Room& own, int64_t column, Each each) {
  const int64_t wide = own.q.wide, end = column + own.count() * wide;
  const float* scores = own.scores.data();
  const int32_t* key = own.places.data();
  vi last;
  std::memcpy(&last, own.last + column, sizeof last);
  for (int64_t place = column; place < end; place += wide) {
    const vi behind = vi{} + *key++ > last;
    each(place, behind ? broadcast(-kInfinity) : load(scores + place));
  }
}

// Scores to e^(score - largest), in place, and what the sums of values are to be multiplied with, and the log-sum-exps.
void weigh(Room& own) {
  float* weights = own.scores.data();
  for (int64_t column = 0; column < own.q.wide; column += kWidth) {
    vf most = broadcast(-kInfinity), total{};
    over_keys(own, column, [&](int64_t, vf score) { most = max(most, score); });
    const vf limit = most == broadcast(-kInfinity) ? vf{} : most;
    over_keys(own, column, [&](int64_t place, vf score) {
      const vf weight = exp(score - limit);
      total += weight;
      store(weights + place, weight);
    });
    const vf lse = total == total ? limit + log(total) : total;
    store(own.share + column, total == vf{} ? vf{} : 1.0f / total);
    store(own.lse + column, total == vf{} ? broadcast(kInfinity) : lse);
  }
}

// Scores to weights, and the gradients of the weights (own.pulls) to those of the scores, both in place.
void weigh_backward(Room& own) {
  const int64_t wide = own.q.wide, end = own.count() * wide;
  float *weights = own.scores.data(), *pulls = own.pulls.data();
  for (int64_t column = 0; column < wide; column += kWidth) {
    const vf lse = load(own.lse + column);
    vf mean{};
    over_keys(own, column, [&](int64_t place, vf score) {
      const vf weight = exp(score - lse);
      mean += weight * load(pulls + place);
      store(weights + place, weight);
    });
    for (int64_t place = column; place < end; place += wide) store(pulls + place, load(weights + place) * (load(pulls + place) - mean));
  }
}

struct Given {
  const Sizes& sizes;
  View q, k, v;
  const int64_t* index;
  const bool* valid;
  const int32_t* last;
  float scale;
  mutable std::atomic<bool> beyond{false};  // whether an entry that counts names no key

  // Gathers the keys that entries of a unit's list name, but those that none of its queries reads.
  void gather(const Unit& unit, int64_t begin, int64_t end, Room& own) const {
    const int32_t most = *std::max_element(last + unit.first, last + unit.first + unit.length);
    own.places.clear();
    for (int64_t entry = unit.list * sizes.kept + begin; entry < unit.list * sizes.kept + end; ++entry) {
      if (!valid[entry]) continue;
      if (index[entry] < 0 || index[entry] >= sizes.keys) beyond = true;
      if (!beyond && index[entry] <= most) own.places.push_back(int32_t(index[entry]));
    }
    for (const auto& [from, to] : {std::pair{&k, &own.keys}, std::pair{&v, &own.values}}) {
      const int64_t columns = padded(from->by.width);
      float* row = room(*to, own.count() * columns);
      for (const int32_t place : own.places) from->take(unit.batch, unit.key_head, place, 1.0f, row), row += columns;
    }
  }

  // The scores of a unit's queries from `begin` on, in own.scores.
  void score(const Unit& unit, int64_t begin, Room& own) const {
    own.q.take(q, unit, begin, scale);
    for (int64_t row = 0; row < own.q.wide; ++row) own.last[row] = row < own.q.count ? last[unit.query_of(begin + row)] : -1;
    multiply(own.keys.data(), own.count(), own.q, own.scores);
  }
};

// For each query of a chunk the sum of gathered rows by weights [K, wide], times its share, at its place in `to`.
void put_sums(Room& own, const Unit& unit, int64_t begin, const std::vector<float>& weights, const std::vector<float>& rows,
              int64_t width, float* to) {
  const int64_t columns = padded(width), wide = own.q.wide, count = own.q.count;
  float* out = room(own.out, count * columns);
  product({weights.data(), 1, wide}, rows.data(), columns, out, columns, count, columns, own.count(), false);
  for (int64_t row = 0; row < count; ++row)
    for (int64_t i = 0; i < width; i += kWidth)
      store(to + unit.place_of(begin + row) * width + i, load(out + row * columns + i) * own.share[row], width - i);
}

// Of all queries of a unit, the results over the gathered part of its list.
void attend(Room& own, const Given& given, const Unit& unit, float* y, float* lse) {
  for (int64_t begin = 0; begin < unit.rows; begin += kQueries) {
    given.score(unit, begin, own);
    weigh(own);
    put_sums(own, unit, begin, own.scores, own.values, given.v.by.width, y);
    for (int64_t row = 0; row < own.q.count; ++row) lse[unit.place_of(begin + row)] = own.lse[row];
  }
}

// Sums over a chunk's queries for each gathered key, added to those of the chunks before.
void add_sums(const Room& own, const std::vector<float>& weights, const Packed& x, bool first, std::vector<float>& to) {
  float* sums = room(to, own.count() * x.columns);
  product({weights.data(), x.wide, 1}, x.along.data(), x.columns, sums, x.columns, own.count(), x.columns, x.count, !first);
}

void add_rows(const std::vector<float>& rows, const std::vector<int32_t>& places, int64_t width, float* to) {
  for (size_t j = 0; j < places.size(); ++j)
    for (int64_t i = 0; i < width; i += kWidth) {
      float* one = to + places[j] * width + i;
      store(one, load(one, width - i) + load(rows.data() + int64_t(j) * padded(width) + i), width - i);
    }
}

// The gradients of a unit's queries, and what it adds to those of its key head, dk [N, e] and dv [N, e_v].
void attend_backward(Room& own, const Given& given, const Unit& unit, const View& dy, const float* lse, float* dq, float* dk, float* dv) {
  for (int64_t begin = 0; begin < unit.rows; begin += kQueries) {
    given.score(unit, begin, own);
    own.dy.take(dy, unit, begin, 1.0f);
    multiply(own.values.data(), own.count(), own.dy, own.pulls);
    for (int64_t row = 0; row < own.q.count; ++row) own.lse[row] = lse[unit.place_of(begin + row)];
    weigh_backward(own);
    add_sums(own, own.scores, own.dy, begin == 0, own.dvalues);
    add_sums(own, own.pulls, own.q, begin == 0, own.dkeys);
    std::fill_n(own.share, kQueries, given.scale);
    put_sums(own, unit, begin, own.pulls, own.keys, given.k.by.width, dq);
  }
  add_rows(own.dkeys, own.places, given.k.by.width, dk);
  add_rows(own.dvalues, own.places, given.v.by.width, dv);
}

}  // namespace

// Rows of numbers, each together: q [B, H, T, e], k [B, H_kv, N, e], v [B, H_kv, N, e_v]; index and valid [B, G, Q, K]; last [T]. Part p of
// the lists leaves its results in y [p, B, H, T, e_v] and lse [p, B, H, T]. Returns 1 where an entry that counts names no key, else 0.
extern "C" int64_t selected_attention(const void* q, const void* k, const void* v, const int64_t* index, const bool* valid,
                                      const int32_t* last, const Sizes& sizes, double scale, float* y, float* lse) {
  const Given given{sizes, {q, sizes.half, sizes.q}, {k, sizes.half, sizes.k}, {v, sizes.half, sizes.v}, index, valid, last, float(scale)};
  const int64_t units = sizes.units(), parts = sizes.parts, rows = sizes.batch * sizes.heads * sizes.queries;
  parallel_for(sizes.batch * sizes.key_heads * units * parts, sizes.threads, [&](int64_t task) {
    static thread_local Room own;
    const int64_t part = task % parts;
    const Unit unit(sizes, task / parts / units, task / parts % units);
    given.gather(unit, sizes.kept * part / parts, sizes.kept * (part + 1) / parts, own);
    attend(own, given, unit, y + part * rows * sizes.v.width, lse + part * rows);
  });
  return given.beyond;
}

// dy [B, H, T, e_v], as q; dq [B, H, T, e]; dk and dv [B, H_kv, N, e or e_v]. The units of a key head go one after the other, so that its
// gradients are summed in one order, by one thread.
extern "C" int64_t selected_attention_backward(const void* q, const void* k, const void* v, const int64_t* index, const bool* valid,
                                               const int32_t* last, const Sizes& sizes, double scale, const void* dy, const float* lse,
                                               float* dq, float* dk, float* dv) {
  const Given given{sizes, {q, sizes.half, sizes.q}, {k, sizes.half, sizes.k}, {v, sizes.half, sizes.v}, index, valid, last, float(scale)};
  parallel_for(sizes.batch * sizes.key_heads, sizes.threads, [&](int64_t key_row) {
    static thread_local Room own;
    float *own_dk = dk + key_row * sizes.keys * sizes.k.width, *own_dv = dv + key_row * sizes.keys * sizes.v.width;
    std::fill_n(own_dk, sizes.keys * sizes.k.width, 0.0f);
    std::fill_n(own_dv, sizes.keys * sizes.v.width, 0.0f);
    for (int64_t number = 0; number < sizes.units(); ++number) {
      const Unit unit(sizes, key_row, number);
      given.gather(unit, 0, sizes.kept, own);
      attend_backward(own, given, unit, {dy, sizes.half, sizes.dy}, lse, dq, own_dk, own_dv);
    }
  });
  return given.beyond;
}

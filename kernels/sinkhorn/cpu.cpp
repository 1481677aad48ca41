// SPDX-License-Identifier: Apache-2.0
// Sinkhorn in the log domain: a matrix and its transpose stay in the cache through all iterations, forward and backward. A row step is a
// column step of the transpose, so that every sum runs down whole vectors. See cpu.py for the duals.
//
// Between steps the duals move little, so that most steps need no exponential of the whole matrix: they scale the rows and columns of one
// that was formed before, and where the scales leave the range that keeps float32 exact, the step is taken in the log domain and the
// matrix is formed again. Entries that have become zero there would have been below e^-50 of their sums.
#include <optional>

#include "native.h"

using namespace native;

namespace {

constexpr float kNowhere = -1e30f;  // the dual of a column that only fills up a vector
constexpr float kFar = 10.0f;       // how far a dual may be from the one that the scaled matrix was formed with

// A matrix [n, n], its rows filled up to whole vectors.
struct Matrix {
  int64_t n, width;
  std::vector<float> data;
  explicit Matrix(int64_t n) : n(n), width(padded(n)), data(size_t(n * width), 0.0f) {}
  Matrix(const float* from, int64_t n, bool transposed) : Matrix(n) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) (transposed ? row(j)[i] : row(i)[j]) = from[i * n + j];
  }
  float* row(int64_t i) { return data.data() + i * width; }
  const float* row(int64_t i) const { return data.data() + i * width; }
};

// The numbers of a dual, filled up.
struct Dual {
  std::vector<float> data;
  explicit Dual(int64_t n, float fill = kNowhere) : data(size_t(padded(n)), fill) {}
  Dual(const float* from, int64_t n) : Dual(n) { std::copy_n(from, n, data.begin()); }
  float* begin() { return data.data(); }
  const float* begin() const { return data.data(); }
};

// of_column_j = -logsumexp_i(a_ij + of_row_i)
void normalise(const Matrix& a, const Dual& of_row, Dual& of_column) {
  for (int64_t j = 0; j < a.width; j += kWidth) {
    vf most = broadcast(-kInfinity), total{};
    for (int64_t i = 0; i < a.n; ++i) most = max(most, load(a.row(i) + j) + of_row.begin()[i]);
    for (int64_t i = 0; i < a.n; ++i) total += exp(load(a.row(i) + j) + of_row.begin()[i] - most);
    store(of_column.begin() + j, -(most + log(total)));
  }
  std::fill(of_column.begin() + a.n, of_column.begin() + a.width, kNowhere);
}

// The gradient through one step, `of_row` having been set last: g_ij -= exp(a_ij + of_row_i + of_column_j) pull_i, and the column sums of
// what was taken.
void take(const Matrix& a, const Dual& of_row, const Dual& of_column, const Dual& pull, Matrix& g, Dual& taken) {
  for (int64_t j = 0; j < a.width; j += kWidth) {
    vf total{};
    const vf here = load(of_column.begin() + j);
    for (int64_t i = 0; i < a.n; ++i) {
      const vf through = exp(load(a.row(i) + j) + of_row.begin()[i] + here) * pull.begin()[i];
      store(g.row(i) + j, load(g.row(i) + j) - through);
      total += through;
    }
    store(taken.begin() + j, total);
  }
}

// The entries exp(a_ij + u_i + v_j), without what is negligible.
Matrix visible(const Matrix& a, const Dual& u, const Dual& v, float negligible) {
  Matrix y(a.n);
  for (int64_t i = 0; i < a.n; ++i)
    for (int64_t j = 0; j < a.width; j += kWidth) {
      const vf logarithm = load(a.row(i) + j) + u.begin()[i] + load(v.begin() + j);
      store(y.row(i) + j, logarithm < broadcast(negligible) ? vf{} : exp(logarithm));
    }
  return y;
}

// of - base, as long as it is small; what only fills up is 0.
bool near(const Dual& of, const Dual& base, int64_t n, float limit, Dual& difference) {
  vf most{};
  for (int64_t j = 0; j < n; j += kWidth) {
    const vf own = load(of.begin() + j, n - j) - load(base.begin() + j, n - j);
    store(difference.begin() + j, own);
    most = max(most, own < vf{} ? -own : own);
  }
  return largest(most) <= limit;
}

// A matrix exp(a_ij + u_i + v_j) and its transpose, whose rows and columns are scaled from step to step.
struct Scaled {
  Dual u, v, row, column;  // the duals it was formed with, and the scales by row and by column
  Matrix k, turned;
  Scaled(const Matrix& a, const Matrix& a_turned, const Dual& u, const Dual& v)
      : u(u), v(v), row(a.n, 1.0f), column(a.n, 1.0f), k(visible(a, u, v, -kInfinity)), turned(visible(a_turned, v, u, -kInfinity)) {}

  // A column step and a row step, which give new duals; false, and no duals, where the scales would leave their range.
  bool step(Dual& new_u, Dual& new_v) {
    return scale(k, row, v, column, new_v) && scale(turned, column, u, row, new_u);
  }

 private:
  static bool scale(const Matrix& k, const Dual& given, const Dual& base, Dual& found, Dual& dual) {
    vf least = broadcast(kInfinity), most{};
    for (int64_t j = 0; j < k.width; j += kWidth) {
      vf total{};
      for (int64_t i = 0; i < k.n; ++i) total += load(k.row(i) + j) * given.begin()[i];
      for (int64_t lane = k.n - j; lane < kWidth; ++lane) total[lane] = 1.0f;
      least = total < least ? total : least;
      most = max(most, total);
      store(found.begin() + j, 1.0f / total);
      store(dual.begin() + j, load(base.begin() + j) - log(total));
    }
    std::fill(dual.begin() + k.n, dual.begin() + k.width, kNowhere);
    return -largest(-least) >= std::exp(-kFar) && largest(most) <= std::exp(kFar);
  }
};

void forward(const float* from, float* y, float* duals, int64_t n, int64_t iterations, bool implicit, float negligible) {
  const Matrix a(from, n, false), turned(from, n, true);
  Dual u(n, 0.0f), v(n);
  std::optional<Scaled> scaled;
  for (int64_t t = 0; t < iterations; ++t) {
    Dual next_u(n), next_v(n);
    if (scaled && scaled->step(next_u, next_v)) {
      u = next_u, v = next_v;
    } else {
      normalise(a, u, v);
      normalise(turned, v, u);
      scaled.emplace(a, turned, u, v);
    }
    float* own = duals + (implicit ? 0 : t) * 2 * n;
    std::copy_n(v.begin(), n, own);
    std::copy_n(u.begin(), n, own + n);
  }
  const Matrix found = visible(a, u, v, negligible);
  for (int64_t i = 0; i < n; ++i) std::copy_n(found.row(i), n, y + i * n);
}

// du_i and dv_j: the sums of g by row and by column.
void sums(const Matrix& g, Dual& du, Dual& dv) {
  std::fill(dv.begin(), dv.begin() + g.width, 0.0f);
  for (int64_t i = 0; i < g.n; ++i) {
    vf total{};
    for (int64_t j = 0; j < g.width; j += kWidth) {
      total += load(g.row(i) + j);
      store(dv.begin() + j, load(dv.begin() + j) + load(g.row(i) + j));
    }
    du.begin()[i] = sum(total);
  }
}

// `take` from a matrix k = exp(a_ij + base_row_i + base_column_j), where both duals are near its own.
void take_scaled(const Matrix& k, const Dual& from_row, const Dual& from_column, const Dual& pull, Matrix& g, Dual& taken) {
  Dual pulls(k.n);
  for (int64_t i = 0; i < k.width; i += kWidth) store(pulls.begin() + i, exp(load(from_row.begin() + i)) * load(pull.begin() + i));
  for (int64_t j = 0; j < k.width; j += kWidth) {
    vf total{};
    const vf here = exp(load(from_column.begin() + j));
    for (int64_t i = 0; i < k.n; ++i) {
      const vf through = load(k.row(i) + j) * here * pulls.begin()[i];
      store(g.row(i) + j, load(g.row(i) + j) - through);
      total += through;
    }
    store(taken.begin() + j, total);
  }
}

// What row steps take is collected in g, what column steps take in its transpose.
void unrolled(const Matrix& a, const Matrix& turned, const float* duals, int64_t iterations, Matrix& g) {
  const int64_t n = a.n;
  const Dual last_v(duals + (iterations - 1) * 2 * n, n), last_u(duals + (iterations - 1) * 2 * n + n, n);
  const Matrix k = visible(a, last_u, last_v, -kInfinity), k_turned = visible(turned, last_v, last_u, -kInfinity);
  Dual from_u(n), from_v(n);
  Matrix other(n);
  Dual du(n), dv(n), taken(n), none(n, 0.0f);
  sums(g, du, dv);
  for (int64_t t = iterations - 1; t >= 0; --t) {
    const Dual v(duals + t * 2 * n, n), u(duals + t * 2 * n + n, n);
    const bool close = near(v, last_v, n, kFar, from_v);
    if (close && near(u, last_u, n, kFar, from_u))
      take_scaled(k, from_u, from_v, du, g, taken);
    else
      take(a, u, v, du, g, taken);
    for (int64_t j = 0; j < a.width; j += kWidth) store(dv.begin() + j, load(dv.begin() + j) - load(taken.begin() + j));
    Dual before(n, 0.0f);
    if (t) std::copy_n(duals + (t - 1) * 2 * n + n, n, before.begin());
    if (close && near(before, last_u, n, kFar, from_u))
      take_scaled(k_turned, from_v, from_u, dv, other, taken);
    else
      take(turned, v, before, dv, other, taken);
    for (int64_t i = 0; i < a.width; i += kWidth) store(du.begin() + i, -load(taken.begin() + i));
    dv = none;
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) g.row(i)[j] += other.row(j)[i];
}

// Through the limit: dA = g - P (alpha_i + beta_j) with alpha = g 1 - P beta, beta = g' 1 - P' alpha.
void through_limit(const Matrix& a, const float* duals, int64_t iterations, Matrix& g) {
  const int64_t n = a.n;
  const Matrix p = visible(a, Dual(duals + n, n), Dual(duals, n), -kInfinity);
  Dual du(n, 0.0f), dv(n, 0.0f);
  sums(g, du, dv);
  Dual alpha(du), beta(dv);
  for (int64_t t = 0; t < iterations; ++t) {
    beta = dv;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < a.width; j += kWidth) store(beta.begin() + j, load(beta.begin() + j) - load(p.row(i) + j) * alpha.begin()[i]);
    for (int64_t i = 0; i < n; ++i) {
      vf total{};
      for (int64_t j = 0; j < a.width; j += kWidth) total += load(p.row(i) + j) * load(beta.begin() + j);
      alpha.begin()[i] = du.begin()[i] - sum(total);
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < a.width; j += kWidth)
      store(g.row(i) + j, load(g.row(i) + j) - load(p.row(i) + j) * (load(beta.begin() + j) + alpha.begin()[i]));
}

void backward(const float* dy, const float* from, const float* duals, float* da, int64_t n, int64_t iterations, bool implicit,
              float negligible) {
  const Matrix a(from, n, false);
  const float* last = duals + (implicit ? 0 : iterations - 1) * 2 * n;
  Matrix g = visible(a, Dual(last + n, n), Dual(last, n), negligible);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) g.row(i)[j] *= dy[i * n + j];
  if (implicit)
    through_limit(a, duals, iterations, g);
  else
    unrolled(a, Matrix(from, n, true), duals, iterations, g);
  for (int64_t i = 0; i < n; ++i) std::copy_n(g.row(i), n, da + i * n);
}

}  // namespace

extern "C" {

void sinkhorn(const float* a, float* y, float* duals, int64_t matrices, int64_t n, int64_t iterations, int64_t implicit, double negligible,
              int64_t threads) {
  parallel_for(matrices, threads, [&](int64_t m) {
    forward(a + m * n * n, y + m * n * n, duals + m * (implicit ? 1 : iterations) * 2 * n, n, iterations, implicit, float(negligible));
  });
}

void sinkhorn_backward(const float* dy, const float* a, const float* duals, float* da, int64_t matrices, int64_t n, int64_t iterations,
                       int64_t implicit, double negligible, int64_t threads) {
  parallel_for(matrices, threads, [&](int64_t m) {
    const int64_t at = m * n * n;
    backward(dy + at, a + at, duals + m * (implicit ? 1 : iterations) * 2 * n, da + at, n, iterations, implicit, float(negligible));
  });
}
}

// The elementwise part of `hyper_geom._pairwise` in one pass over a block of rows, for float32 on the CPU.
//
// Plain C functions without torch's headers: they compile in a second, and what the compiler vectorises runs anywhere.
// A side is an array (5, num) as for the Triton kernels: stretch, sinh r, exp(r/2) - 1, exp(-r/2)/2 and coth r. The
// block's rows start at `x`, whose five parts are `x_step` apart.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

inline float from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int32_t to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// log(1 + t) for t >= 0. With 1 + f = m in [sqrt(1/2), sqrt 2) and s = f/(2+f), log(1+f) = f - s (f - R) and
// R = 2 (s^2/3 + s^4/5 + ..); d is what the rounding of 1 + t lost, and 1/m = 1 - 2s + 2s^2 - .. serves for d/(1+t).
inline float log_1p(float t) {
  const float v = 1.0f + t;
  const float lost = t - (v - 1.0f);
  const int32_t bits = to_bits(v);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const float f = from_bits(bits - exponent * (1 << 23)) - 1.0f;
  const float s = f / (2.0f + f), z = s * s;
  const float rest = z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * (0.222222222f + z * 0.181818182f))));
  const float reciprocal = from_bits((127 - exponent) * (1 << 23)) * (1.0f + 2.0f * (z - s - s * z));
  const float e = static_cast<float>(exponent);
  return e * 0.693359375f + ((f - s * (f - rest)) + (lost * reciprocal - e * 2.12194440e-4f));
}

// exp(x) for x <= 0, 0 below -87.
inline float exp_negative(float x) {
  const float kept = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(kept * 1.44269504f);
  const float r = (kept - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p =
      1.0f + r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (8.33333333e-3f + r * (1.38888889e-3f + r * 1.98412698e-4f))))));
  return x < -87.0f ? 0.0f : p * from_bits((static_cast<int32_t>(n) + 127) * (1 << 23));
}

struct Row {
  float stretch, sinh, gap, decay, coth;
  Row(const float* x, int64_t step, int64_t i)
      : stretch(-0.5f * x[i]), sinh(x[step + i]), gap(x[2 * step + i]), decay(x[3 * step + i]), coth(x[4 * step + i]) {}
};

inline float product_of(float dot, const Row& row, float stretch, float sinh) {
  const float product = dot * row.stretch * stretch + 0.5f * (row.sinh * sinh);
  return product < 0.0f ? 0.0f : product;
}

inline float half_of(const Row& row, float gap, float decay) { return (row.gap - gap) * (row.decay + decay); }

inline float dist_of(float h) {
  const float root = std::sqrt(h);
  return log_1p(2.0f * root * (root + std::sqrt(1.0f + h)));
}

// dL/dh, with the guard against the noise of h.
inline float slope_of(float grad, float h, float noise, float tiny) {
  const float guarded = h + noise;
  return grad / (std::sqrt(guarded < tiny ? tiny : guarded) * std::sqrt(1.0f + h));
}

// body(first, last, thread) on one share of the rows for each thread.
template <typename Body>
inline void share_rows(int64_t n, int32_t threads, Body body) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    body(n * thread / count, n * (thread + 1) / count, thread);
  }
#else
  body(0, n, 0);
#endif
}

constexpr int64_t TILE = 1024;  // columns at a time, so that what two passes share stays in the first cache

// Columns first .. first + num of a row: the product part of h and dL/ddist to weights; adds to the three sums.
inline void grad_columns(
    const float* p, const float* g, float* w, const Row& row, const float* y, int64_t m, int64_t num, float floor,
    float tiny, float unit, float* column, float& angular_total, float& radial_total) {
  float angular_sum = 0.0f, radial_sum = 0.0f;
#pragma omp simd reduction(+ : angular_sum, radial_sum)
  for (int64_t j = 0; j < num; ++j) {
    const float half = half_of(row, y[2 * m + j], y[3 * m + j]), half_sq = half * half;
    const float slope = slope_of(g[j] * unit, half_sq + p[j], floor * y[m + j], tiny);
    const float angular = slope * p[j], radial = slope * half * std::sqrt(1.0f + half_sq);
    angular_sum += angular;
    radial_sum += radial;
    column[j] += angular * y[4 * m + j] - radial;
    w[j] = slope * row.stretch * y[j];
  }
  angular_total += angular_sum;
  radial_total += radial_sum;
}

// What one pair of points needs, in double: the float inputs are exact there, so only the last rounding is felt.
struct Pair {
  double q, x0, y0, dot_difference;  // the squared chord, both times k, and (x - y).(x + y)

  Pair(const float* x, const float* y, int64_t dim, double c) {
    double xx = 0, yy = 0, xy = 0, dt = 0, tt = 0, cross = 0;
#pragma omp simd reduction(+ : xx, yy, xy, dt, tt)
    for (int64_t k = 0; k < dim; ++k) {
      const double a = x[k], b = y[k], delta = a - b, total = a + b;
      xx += a * a, yy += b * b, xy += a * b, dt += delta * total, tt += total * total;
    }
    const double X = c * xx, Y = c * yy;
    x0 = std::sqrt(1 + X), y0 = std::sqrt(1 + Y), dot_difference = dt;
    // `chord_sq` of lorentz/_metric.py derives both forms.
    if (xy > 0) {
      const double along = dt / tt;
#pragma omp simd reduction(+ : cross)
      for (int64_t k = 0; k < dim; ++k) {
        const double rest = (double(x[k]) - y[k]) - along * (double(x[k]) + y[k]);
        cross += rest * rest;
      }
      const double s_sq = c * tt, s0 = x0 + y0;
      const double E = 2 + 2 * x0 * y0 + 4 * (X / s_sq) * Y + 2 * (c * xy) * ((X + Y) / s_sq);
      q = c * cross * (s0 * (s0 / E)) + 4 * (along * along * s_sq) / E;
    } else {
      const double w = 1 + x0 * y0, direct = 2 * ((X + Y) / w + X * (Y / w) - c * xy);
      q = direct < 0 ? 0 : direct;
    }
  }
};

}  // namespace

extern "C" {

// Distances of n pairs; c is one number where `c_step` is 0.
void hyper_geom_pairs(
    const float* x, const float* y, const float* c, int64_t c_step, float* dist, int64_t n, int64_t dim,
    int32_t threads) {
  share_rows(n, threads, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) {
      const double curvature = c[i * c_step];
      const Pair pair(x + i * dim, y + i * dim, dim, curvature);
      dist[i] = static_cast<float>(2 * std::asinh(std::sqrt(pair.q) / 2) / std::sqrt(curvature));
    }
  });
}

// dL/dx, dL/dy and each pair's dL/dc. With v = (y0/x0) x - y, dq/dx = 2c v, dq/dy = -2c (x0/y0) v, dq/dc = |v|^2 x0/y0.
void hyper_geom_pairs_grad(
    const float* x, const float* y, const float* c, int64_t c_step, const float* grad, float* grad_x, float* grad_y,
    float* grad_c, int64_t n, int64_t dim, int32_t threads) {
  share_rows(n, threads, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) {
      const float *a = x + i * dim, *b = y + i * dim;
      const double curvature = c[i * c_step], k = std::sqrt(curvature);
      const Pair pair(a, b, dim, curvature);
      const double slope = pair.q == 0 ? 0 : grad[i] / (2 * k * std::sqrt(pair.q) * std::sqrt(1 + pair.q / 4));
      // y0 - x0 without cancellation.
      const double lag = -curvature * pair.dot_difference / (pair.x0 + pair.y0) / pair.x0, ratio = pair.x0 / pair.y0;
      const double by_x = 2 * curvature * slope, by_y = -by_x * ratio;
      double v_sq = 0;
#pragma omp simd reduction(+ : v_sq)
      for (int64_t j = 0; j < dim; ++j) {
        const double v = (double(a[j]) - b[j]) + lag * a[j];
        v_sq += v * v;
        grad_x[i * dim + j] = static_cast<float>(by_x * v);
        grad_y[i * dim + j] = static_cast<float>(by_y * v);
      }
      const double d = 2 * std::asinh(std::sqrt(pair.q) / 2) / k;
      grad_c[i] = static_cast<float>(slope * v_sq * ratio - grad[i] * d / (2 * curvature));
    }
  });
}

// Inner products (n, m) to `unit` times k times the distances; they become the product part of h where `keep`, else `dist` may be `dot` itself.
void hyper_geom_dist(
    float* dot, float* dist, const float* x, int64_t x_step, const float* y, int64_t n, int64_t m, float unit,
    int32_t keep, int32_t threads) {
  share_rows(n, threads, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) {
      const Row row(x, x_step, i);
      float* from = dot + i * m;
      float* to = dist + i * m;
      if (keep) {
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          const float product = product_of(from[j], row, y[j], y[m + j]);
          const float half = half_of(row, y[2 * m + j], y[3 * m + j]);
          from[j] = product;
          to[j] = dist_of(half * half + product) * unit;
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          const float half = half_of(row, y[2 * m + j], y[3 * m + j]);
          to[j] = dist_of(half * half + product_of(from[j], row, y[j], y[m + j])) * unit;
        }
      }
    }
  });
}

// The product part of h and dL/ddist (n, m) to the matrix that multiplies the vectors, and both sides' radial sums:
// `row_sum` (n), and one row of `col_sum` (threads, m) for each thread, which starts at 0.
void hyper_geom_grad(
    const float* product, const float* grad, float* weight, const float* x, int64_t x_step, const float* y, int64_t n,
    int64_t m, float noise, float tiny, float unit, float* row_sum, float* col_sum, int32_t threads) {
  share_rows(n, threads, [=](int64_t first, int64_t last, int64_t thread) {
    float* column = col_sum + thread * m;
    for (int64_t i = first; i < last; ++i) {
      const Row row(x, x_step, i);
      const float floor = noise * row.sinh;
      float angular_sum = 0.0f, radial_sum = 0.0f;
      grad_columns(
          product + i * m, grad + i * m, weight + i * m, row, y, m, m, floor, tiny, unit, column, angular_sum, radial_sum);
      row_sum[i] = angular_sum * row.coth + radial_sum;
    }
  });
}

// Inner products to logits, in place, and their log-sum-exps without the entries (i, label[i]): `row_lse` (n), and for
// each thread the columns' largest logit and sum relative to it, `col_peak` and `col_total` (threads, m), which start at
// -inf and 0. No columns where `col_peak` is null.
void hyper_geom_lse(
    float* dot, const float* x, int64_t x_step, const float* y, float scale, const int64_t* label, int64_t n, int64_t m,
    float* row_lse, float* col_peak, float* col_total, int32_t threads) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  share_rows(n, threads, [=](int64_t first, int64_t last, int64_t thread) {
    float* peak = col_peak == nullptr ? nullptr : col_peak + thread * m;
    for (int64_t i = first; i < last; ++i) {
      const Row row(x, x_step, i);
      float* logit = dot + i * m;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) {
        const float half = half_of(row, y[2 * m + j], y[3 * m + j]);
        logit[j] = -scale * dist_of(half * half + product_of(logit[j], row, y[j], y[m + j]));
      }
      logit[label[i]] = none;
      float top = none, total = 0.0f;
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < m; ++j) top = logit[j] > top ? logit[j] : top;
      const float finite = top == none ? 0.0f : top;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < m; ++j) total += exp_negative(logit[j] - finite);
      row_lse[i] = finite + std::log(total);
      if (peak != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) peak[j] = logit[j] > peak[j] ? logit[j] : peak[j];
      }
    }
    if (peak == nullptr) return;
    float* sum = col_total + thread * m;
    for (int64_t i = first; i < last; ++i) {
      const float* logit = dot + i * m;
#pragma omp simd
      for (int64_t j = 0; j < m; ++j) sum[j] += exp_negative(logit[j] - (peak[j] == none ? 0.0f : peak[j]));
    }
  });
}

// Inner products to the matrix that multiplies the vectors, in place, for gradients of those log-sum-exps. The columns'
// part is left out where `col_lse` is null. `scale_sum` (n) are the rows' parts of dL/dscale.
void hyper_geom_lse_grad(
    float* dot, const float* x, int64_t x_step, const float* y, float scale, const int64_t* label, int64_t n, int64_t m,
    const float* row_lse, const float* col_lse, const float* row_grad, const float* col_grad, float noise, float tiny,
    float* row_sum, float* col_sum, float* scale_sum, int32_t threads) {
  share_rows(n, threads, [=](int64_t first, int64_t last, int64_t thread) {
    float product[TILE], dist[TILE], share[TILE];
    for (int64_t i = first; i < last; ++i) {
      const Row row(x, x_step, i);
      const float floor = noise * row.sinh, lse = row_lse[i], factor = row_grad[i];
      float angular_sum = 0.0f, radial_sum = 0.0f, weighted = 0.0f;
      for (int64_t start = 0; start < m; start += TILE) {
        const int64_t num = m - start < TILE ? m - start : TILE, positive = label[i] - start;
        const float* side = y + start;
        float* w = dot + i * m + start;
#pragma omp simd
        for (int64_t j = 0; j < num; ++j) {
          product[j] = product_of(w[j], row, side[j], side[m + j]);
          const float half = half_of(row, side[2 * m + j], side[3 * m + j]);
          dist[j] = dist_of(half * half + product[j]);
          share[j] = exp_negative(-scale * dist[j] - lse) * factor;
        }
        if (col_lse != nullptr) {
          const float *other = col_lse + start, *other_grad = col_grad + start;
#pragma omp simd
          for (int64_t j = 0; j < num; ++j) share[j] += exp_negative(-scale * dist[j] - other[j]) * other_grad[j];
        }
        // After the exponentials: where nothing but the positive is left they are not finite.
        if (positive >= 0 && positive < num) share[positive] = 0.0f;
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (int64_t j = 0; j < num; ++j) {
          part += share[j] * dist[j];
          share[j] *= -scale;
        }
        weighted -= part;
        grad_columns(
            product, share, w, row, side, m, num, floor, tiny, 1.0f, col_sum + thread * m + start, angular_sum, radial_sum);
      }
      row_sum[i] = angular_sum * row.coth + radial_sum;
      scale_sum[i] = weighted;
    }
  });
}

// grad - e (e.grad) with e = x inverse, row by row and in place.
void hyper_geom_tangential(
    float* grad, const float* x, const float* inverse, int64_t n, int64_t dim, int32_t threads) {
  share_rows(n, threads, [=](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) {
      const float* v = x + i * dim;
      float* g = grad + i * dim;
      float along = 0.0f;
#pragma omp simd reduction(+ : along)
      for (int64_t k = 0; k < dim; ++k) along += v[k] * g[k];
      along *= inverse[i] * inverse[i];
#pragma omp simd
      for (int64_t k = 0; k < dim; ++k) g[k] -= along * v[k];
    }
  });
}

}  // extern "C"

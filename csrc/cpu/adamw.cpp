// block_sums and AdamW on the CPU: one parallel region over the chunks of all tensors.
//
// The references are block_sums_ref and adamw_ref of blocksched.kernels; this computes in their
// order, so that a float32 step has the bits of the reference's, but for the square root, which
// torch's CPU rounds otherwise in some 0.7 % of the cases.
#include "../adamw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../formulas.h"
#include "chunks.h"
#include "lanes.h"

namespace blocksched {
namespace {

// Addresses of one tensor's chunk; nullptr where there is none.
struct Arrays {
  char *p, *g, *m, *v, *x, *w;
};

using Yes = std::true_type;
using No = std::false_type;

struct Options {
  bool sums, update, maximize, narrow_moments;
  double grad_scale;
  uint64_t seed;
  uint32_t step;
};

// Sums of a tile in lanes.
template <class W>
struct LaneSums {
  W gp[LANES] = {}, g2[LANES] = {}, p2[LANES] = {};

  BS_INLINE void add(int l, W p, W g) {
    gp[l] += std::fabs(g * p);
    g2[l] += g * g;
    p2[l] += p * p;
  }

  BS_INLINE void add_to(Sums& sums) const {
    sums[0] += total(gp);
    sums[1] += total(g2);
    sums[2] += total(p2);
  }
};

// The random bits of m (low half of a word) and v (high half) for TILE numbers from `first` on.
BS_INLINE void random_words(uint64_t seed, int64_t first, uint32_t step, uint32_t* words) {
  const uint32_t start = uint32_t(first / 4);
#pragma omp simd
  for (uint32_t i = 0; i < TILE / 4; ++i) philox(seed, start + i, step, words + 4 * i);
}

// Rounds up with the probability that keeps the mean: blocksched/kernels/rounding.py.
BS_INLINE void store_moment(bf16& out, float x, uint32_t bits) {
  const uint32_t raised = as_bits(x) + (bits & 0xffff);
  out.bits = uint16_t(x != x ? 0x7fc0 : raised >> 16);
}

template <class W>
BS_INLINE void store_moment(W& out, W x, uint32_t) {
  out = x;
}

// Up to TILE numbers stored as T, with moments stored as M. One loop, since a core that waits for
// memory can do roots and divisions meanwhile.
template <bool SUMS, bool AMSGRAD, bool MASTER, class T, class M>
BS_INLINE void update_tile(T* p, const T* g, M* m, M* v, Wide<T>* x, Wide<T>* w, int64_t n,
                           const uint32_t* words, const Options& o, const AdamwStep<Wide<T>>& step,
                           Sums& sums) {
  using W = Wide<T>;
  const W inverse_scale = W(1) / W(o.grad_scale), sign = o.maximize ? W(-1) : W(1);
  LaneSums<W> lanes;
  const auto update = [&](int64_t i, int l) BS_INLINE_LAMBDA {
    const W weight = load(p[i]), unscaled = load(g[i]) * inverse_scale, grad = sign * unscaled;
    if constexpr (SUMS) lanes.add(l, weight, unscaled);
    const W mean = adamw_mean(W(load(m[i])), grad, step);
    const W squares = adamw_mean_of_squares(W(load(v[i])), grad, step);
    W most = squares;
    if constexpr (AMSGRAD) {
      most = x[i] >= squares || x[i] != x[i] ? x[i] : squares;
      x[i] = most;
    }
    const W updated = adamw_weight(MASTER ? w[i] : weight, mean, most, step);
    if constexpr (MASTER) w[i] = updated;
    store(p[i], updated);
    const uint32_t bits = is_wide<M> ? 0 : words[i];
    store_moment(m[i], mean, bits);
    store_moment(v[i], squares, bits >> 16);
  };
  by_lanes(n, update, [&](int64_t i) BS_INLINE_LAMBDA {
    fetch(p + i), fetch(g + i), fetch(m + i), fetch(v + i);
  });
  if constexpr (SUMS) lanes.add_to(sums);
}

// One chunk of a tensor; `first` is its place.
template <class T, class M>
BS_INLINE void update_chunk(const Arrays& a, int64_t first, int64_t count, const Options& o,
                            const AdamwStep<Wide<T>>& step, Sums& sums) {
  using W = Wide<T>;
  uint32_t words[is_wide<M> ? 1 : TILE];
  for (int64_t at = 0; at < count; at += TILE) {
    if constexpr (!is_wide<M>) random_words(o.seed, first + at, o.step, words);
    const auto run = [&](auto with_sums, auto amsgrad, auto master) BS_INLINE_LAMBDA {
      constexpr bool SUMS = decltype(with_sums)::value, AMSGRAD = decltype(amsgrad)::value;
      update_tile<SUMS, AMSGRAD, decltype(master)::value>(
          reinterpret_cast<T*>(a.p) + at, reinterpret_cast<const T*>(a.g) + at,
          reinterpret_cast<M*>(a.m) + at, reinterpret_cast<M*>(a.v) + at,
          AMSGRAD ? reinterpret_cast<W*>(a.x) + at : nullptr,
          decltype(master)::value ? reinterpret_cast<W*>(a.w) + at : nullptr,
          std::min(TILE, count - at), words, o, step, sums);
    };
    const auto choose = [&](auto with_sums, auto amsgrad) BS_INLINE_LAMBDA {
      a.w == nullptr ? run(with_sums, amsgrad, No()) : run(with_sums, amsgrad, Yes());
    };
    if (o.sums) {
      a.x == nullptr ? choose(Yes(), No()) : choose(Yes(), Yes());
    } else {
      a.x == nullptr ? choose(No(), No()) : choose(No(), Yes());
    }
  }
}

// The sums alone. Where there is no gradient only the weights count, whatever they are.
template <class T>
BS_INLINE void sum_chunk(const Arrays& a, int64_t count, const Options& o, Sums& sums) {
  using W = Wide<T>;
  const W inverse_scale = W(1) / W(o.grad_scale);
  for (int64_t at = 0; at < count; at += TILE) {
    const int64_t n = std::min(TILE, count - at);
    const T* p = reinterpret_cast<const T*>(a.p) + at;
    if (a.g == nullptr) {
      W lanes[LANES] = {};
      const auto square = [&](int64_t i, int l) BS_INLINE_LAMBDA {
        lanes[l] += W(load(p[i])) * W(load(p[i]));
      };
      by_lanes(n, square, [&](int64_t i) BS_INLINE_LAMBDA { fetch(p + i); });
      sums[2] += total(lanes);
      continue;
    }
    const T* g = reinterpret_cast<const T*>(a.g) + at;
    LaneSums<W> lanes;
    const auto add = [&](int64_t i, int l) BS_INLINE_LAMBDA {
      lanes.add(l, load(p[i]), load(g[i]) * inverse_scale);
    };
    by_lanes(n, add, [&](int64_t i) BS_INLINE_LAMBDA { fetch(p + i), fetch(g + i); });
    lanes.add_to(sums);
  }
}

BS_CLONES void run_chunk(Dtype dtype, const Arrays& a, int64_t first, int64_t count,
                         const Options& o, const AdamwStep<double>& step, Sums& sums) {
  with_type(dtype, [&](auto kind) BS_INLINE_LAMBDA {
    using T = decltype(kind);
    using W = Wide<T>;
    const AdamwStep<W> s = {W(step.decay),     W(step.weight1), W(step.beta2), W(step.weight2),
                            W(step.step_size), W(step.root),    W(step.eps)};
    if (!o.update) {
      sum_chunk<T>(a, count, o, sums);
    } else if (!o.narrow_moments) {
      update_chunk<T, W>(a, first, count, o, s, sums);
    } else if constexpr (!std::is_same_v<T, double>) {
      update_chunk<T, bf16>(a, first, count, o, s, sums);
    }
  });
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// What the chunks of one tensor have in common.
struct Job {
  Arrays arrays;
  Dtype dtype;
  Options options;
  AdamwStep<double> step;

  Arrays from(int64_t first) const {
    const int64_t p = first * size_of(dtype), w = first * (dtype == Dtype::f64 ? 8 : 4);
    const int64_t m = options.narrow_moments ? 2 * first : w;
    const auto moved = [](char* array, int64_t by) { return array ? array + by : nullptr; };
    const Arrays& a = arrays;
    return {moved(a.p, p), moved(a.g, p), moved(a.m, m), moved(a.v, m), moved(a.x, w),
            moved(a.w, w)};
  }
};

// The numbers of step t, in double as the reference has them.
AdamwStep<double> step_numbers(double t, const AdamwNumbers& a) {
  return {1 - a.lr * a.weight_decay,
          1 - a.beta1,
          a.beta2,
          1 - a.beta2,
          a.lr / (1 - std::pow(a.beta1, t)),
          std::pow(1 - std::pow(a.beta2, t), 0.5),
          a.eps};
}

}  // namespace

void adamw(const Table& table, const AdamwNumbers& numbers, double* sums, int64_t n_blocks) {
  std::vector<Job> jobs(table.n);
  std::vector<Extent> extents(table.n);
  for (int64_t i = 0; i < table.n; ++i) {
    Job& job = jobs[i];
    const auto array = [&](Row row) { return reinterpret_cast<char*>(table.at(row, i)); };
    job.arrays = {array(Row::param),      array(Row::grad),           array(Row::exp_avg),
                  array(Row::exp_avg_sq), array(Row::max_exp_avg_sq), array(Row::master)};
    job.dtype = Dtype(table.at(Row::dtype, i));
    const int64_t block = table.at(Row::block, i);
    job.options = {block >= 0 && block < n_blocks,
                   numbers.update && job.arrays.g != nullptr,
                   numbers.maximize,
                   table.at(Row::narrow_moments, i) != 0,
                   numbers.grad_scale,
                   uint64_t(table.at(Row::seed, i)),
                   0};
    const int64_t accesses = job.options.update ? 7 : job.arrays.g ? 2 : 1;
    if (job.options.sums || job.options.update) extents[i] = {table.at(Row::numel, i), accesses};
    if (!job.options.update) continue;
    float& t = *reinterpret_cast<float*>(table.at(Row::step, i));
    t += 1;
    job.options.step = uint32_t(t);
    const bool as_before = i > 0 && jobs[i - 1].options.step == job.options.step;
    job.step = as_before ? jobs[i - 1].step : step_numbers(t, numbers);
  }
  over_chunks(chunks_of(extents), &table.at(Row::block, 0), sums, n_blocks, [&](const Chunk& c) {
    const Job& job = jobs[c.tensor];
    Sums found = {};
    run_chunk(job.dtype, job.from(c.begin), c.begin, c.count, job.options, job.step, found);
    return found;
  });
}

}  // namespace blocksched

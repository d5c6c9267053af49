// block_sums and AdamW on the CPU: one parallel region over the chunks of all tensors.
//
// The references are block_sums_ref and adamw_ref of blocksched.kernels; this computes in their
// order, so that a float32 step has the bits of the reference's, but for the square root, which
// torch's CPU rounds otherwise in some 0.7 % of the cases.
#include <cmath>
#include <limits>
#include <optional>

#include "../formulas.h"
#include "../ops.h"
#include "chunks.h"
#include "lanes.h"

namespace blocksched {
namespace {

using torch::headeronly::ScalarType;

// Addresses of one tensor's chunk; nullptr where there is none.
struct Arrays {
  char *p, *g, *m, *v, *x, *w;
};

struct Options {
  bool sums, update, maximize, narrow_moments;
  double inverse_scale;  // of the gradient
  uint64_t seed;
  uint32_t step;
};

// The three sums of a tile.
template <class W>
BS_INLINE void add_sums(const W* p, const W* g, int64_t n, Sums& sums) {
  if (g != nullptr) {
    sums[0] += sum_of<W>(n, [=](int64_t i) BS_INLINE_LAMBDA { return std::fabs(g[i] * p[i]); });
    sums[1] += sum_of<W>(n, [=](int64_t i) BS_INLINE_LAMBDA { return g[i] * g[i]; });
  }
  sums[2] += sum_of<W>(n, [=](int64_t i) BS_INLINE_LAMBDA { return p[i] * p[i]; });
}

// The random bits of m (low half of a word) and v (high half) for numbers from `first` on.
BS_INLINE void random_words(uint64_t seed, int64_t first, uint32_t step, uint32_t* words) {
#pragma omp simd
  for (int64_t i = 0; i < TILE / 4; ++i) {
    philox(seed, uint32_t(first / 4 + i), step, words + 4 * i);
  }
}

// blocksched/kernels/rounding.py
BS_INLINE void store_stochastic(bf16& out, float x, uint32_t bits) {
  const uint32_t raised = as_bits(x) + (bits & 0xffff);
  out.bits = uint16_t(x != x ? 0x7fc0 : raised >> 16);
}

template <class W, class M>
BS_INLINE void store_moments(const W* m, const W* v, M* m_out, M* v_out, const uint32_t* words,
                             int64_t n) {
  if constexpr (!is_wide<M>) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      store_stochastic(m_out[i], m[i], words[i]);
      store_stochastic(v_out[i], v[i], words[i] >> 16);
    }
  }
}

// One chunk of a tensor stored as T with moments stored as M; `first` is the chunk's place.
template <class T, class M>
BS_INLINE void adamw_chunk_of(const Arrays& a, int64_t first, int64_t count, const Options& o,
                              const AdamwStep<Wide<T>>& step, Sums& sums) {
  using W = Wide<T>;
  W p_buffer[TILE], g_buffer[TILE], m_buffer[TILE], v_buffer[TILE];
  uint32_t words[TILE];
  for (int64_t at = 0; at < count; at += TILE) {
    const int64_t n = std::min(TILE, count - at);
    T* stored = reinterpret_cast<T*>(a.p) + at;
    W* p = widen(stored, p_buffer, n);
    const W* g = nullptr;
    if (a.g != nullptr) {
      g = widen(reinterpret_cast<const T*>(a.g) + at, g_buffer, n);
      if (o.inverse_scale != 1.0) {
        const W by = W(o.inverse_scale);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) g_buffer[i] = g[i] * by;
        g = g_buffer;
      }
    }
    if (o.sums) add_sums(p, g, n, sums);
    if (!o.update) continue;
    if (a.w != nullptr) p = reinterpret_cast<W*>(a.w) + at;
    M *m_stored = reinterpret_cast<M*>(a.m) + at, *v_stored = reinterpret_cast<M*>(a.v) + at;
    W *m = widen(m_stored, m_buffer, n), *v = widen(v_stored, v_buffer, n);
    const W sign = o.maximize ? W(-1) : W(1);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      m[i] = adamw_mean(m[i], sign * g[i], step);
      v[i] = adamw_mean_of_squares(v[i], sign * g[i], step);
    }
    const W* x = v;
    if (a.x != nullptr) {
      W* most = reinterpret_cast<W*>(a.x) + at;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) most[i] = most[i] >= v[i] || most[i] != most[i] ? most[i] : v[i];
      x = most;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) p[i] = adamw_weight(p[i], m[i], x[i], step);
    narrow(p, stored, n);
    if constexpr (!is_wide<M>) {
      random_words(o.seed, first + at, o.step, words);
      store_moments(m, v, m_stored, v_stored, words, n);
    }
  }
}

BS_CLONES void sums_chunk(Dtype dtype, const Arrays& a, int64_t count, Sums& sums) {
  with_type(dtype, [&](auto kind) BS_INLINE_LAMBDA {
    using T = decltype(kind);
    Wide<T> p_buffer[TILE], g_buffer[TILE];
    for (int64_t at = 0; at < count; at += TILE) {
      const int64_t n = std::min(TILE, count - at);
      const Wide<T>* g = nullptr;
      if (a.g != nullptr) g = widen(reinterpret_cast<const T*>(a.g) + at, g_buffer, n);
      add_sums(widen(reinterpret_cast<const T*>(a.p) + at, p_buffer, n), g, n, sums);
    }
  });
}

BS_CLONES void adamw_chunk(Dtype dtype, const Arrays& a, int64_t first, int64_t count,
                           const Options& o, const AdamwStep<double>& step, Sums& sums) {
  with_type(dtype, [&](auto kind) BS_INLINE_LAMBDA {
    using T = decltype(kind);
    using W = Wide<T>;
    const AdamwStep<W> s = {W(step.decay),     W(step.weight1), W(step.beta2), W(step.weight2),
                            W(step.step_size), W(step.root),    W(step.eps)};
    if (o.narrow_moments) {
      if constexpr (!std::is_same_v<T, double>) {
        adamw_chunk_of<T, bf16>(a, first, count, o, s, sums);
      }
    } else {
      adamw_chunk_of<T, W>(a, first, count, o, s, sums);
    }
  });
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "parameters must be float32, float64, bfloat16 or float16: cast them");
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// Raises unless t has the size of its parameter and, if given, the dtype.
void check(const char* name, const Tensor& t, const Tensor& param, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == param.numel() && t.scalar_type() == dtype, name,
                  " must lie on the CPU, with its parameter's number of elements and dtype ",
                  torch::headeronly::toString(dtype), ": got ", t.numel(), " of ",
                  torch::headeronly::toString(t.scalar_type()), " for ", param.numel(),
                  "; load the state with load_state_dict, which converts it");
}

void check_lengths(size_t n, std::initializer_list<size_t> lengths) {
  for (const size_t length : lengths) {
    STD_TORCH_CHECK(length == n, "every list must have an entry a parameter, ", n, ": got ", length);
  }
}

// What the chunks of one tensor have in common.
struct Job {
  Arrays arrays;
  Dtype dtype;
  Options options;
  AdamwStep<double> step;

  Arrays from(int64_t first) const {
    const int64_t p = first * size_of(dtype), w = first * (dtype == Dtype::f64 ? 8 : 4);
    const int64_t m = options.narrow_moments ? 2 * first : w;
    const auto moved = [](char* array, int64_t by) { return array == nullptr ? array : array + by; };
    const Arrays& a = arrays;
    return {moved(a.p, p), moved(a.g, p), moved(a.m, m), moved(a.v, m), moved(a.x, w),
            moved(a.w, w)};
  }
};

// The numbers of step t, in double as the reference has them.
AdamwStep<double> step_numbers(double t, double lr, double beta1, double beta2, double weight_decay,
                               double eps) {
  return {1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - std::pow(beta1, t)),
          std::pow(1 - std::pow(beta2, t), 0.5), eps};
}

char* address(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }

}  // namespace

Tensor block_sums(std::vector<Tensor> params, std::vector<std::optional<Tensor>> grads,
                  std::vector<int64_t> blocks, int64_t n_blocks) {
  check_lengths(params.size(), {grads.size(), blocks.size()});
  std::vector<Job> jobs(params.size());
  std::vector<int64_t> sizes(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = params[i];
    if (grads[i]) check("a gradient", *grads[i], p, p.scalar_type());
    if (blocks[i] >= 0 && blocks[i] < n_blocks) sizes[i] = p.numel();
    jobs[i].dtype = dtype_of(p);
    jobs[i].arrays = {address(p), grads[i] ? address(*grads[i]) : nullptr};
  }
  return over_chunks(chunks_of(sizes), blocks, n_blocks, [&](const Chunk& c) {
    const Job& job = jobs[c.tensor];
    Sums sums = {};
    sums_chunk(job.dtype, job.from(c.begin), c.count, sums);
    return sums;
  });
}

Tensor adamw(std::vector<Tensor> params, std::vector<std::optional<Tensor>> grads,
             std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
             std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> masters,
             std::vector<Tensor> steps, double lr, double beta1, double beta2, double weight_decay,
             double eps, bool maximize, double grad_scale, bool skip, std::vector<int64_t> seeds,
             std::vector<int64_t> blocks, int64_t n_blocks, bool sums) {
  const size_t n = params.size();
  const bool amsgrad = !max_exp_avg_sqs.empty(), mastered = !masters.empty();
  check_lengths(n, {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), steps.size(),
                    blocks.size(), amsgrad ? max_exp_avg_sqs.size() : n,
                    mastered ? masters.size() : n, seeds.empty() ? n : seeds.size()});
  std::vector<Job> jobs(n);
  std::vector<int64_t> sizes(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& p = params[i];
    Job& job = jobs[i];
    job.dtype = dtype_of(p);
    job.arrays = {address(p)};
    const bool summed = sums && blocks[i] >= 0 && blocks[i] < n_blocks;
    job.options = {summed, grads[i] && !skip, maximize, false, 1.0 / grad_scale, 0, 0};
    if (summed || job.options.update) sizes[i] = p.numel();
    if (!grads[i]) continue;
    check("a gradient", *grads[i], p, p.scalar_type());
    job.arrays.g = address(*grads[i]);
    if (skip) continue;
    const ScalarType wide = job.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
    const ScalarType moments = exp_avgs[i].scalar_type();
    job.options.narrow_moments = moments == ScalarType::BFloat16 && job.dtype != Dtype::f64;
    check("exp_avg", exp_avgs[i], p, job.options.narrow_moments ? moments : wide);
    check("exp_avg_sq", exp_avg_sqs[i], p, job.options.narrow_moments ? moments : wide);
    job.arrays.m = address(exp_avgs[i]);
    job.arrays.v = address(exp_avg_sqs[i]);
    if (amsgrad) {
      check("max_exp_avg_sq", max_exp_avg_sqs[i], p, wide);
      job.arrays.x = address(max_exp_avg_sqs[i]);
    }
    if (mastered) {
      check("master_param", masters[i], p, wide);
      job.arrays.w = address(masters[i]);
    }
    STD_TORCH_CHECK(steps[i].is_cpu() && steps[i].numel() == 1 &&
                        steps[i].scalar_type() == ScalarType::Float,
                    "step must be one float32 on the CPU: load the state with load_state_dict, "
                    "which converts it");
    STD_TORCH_CHECK(!job.options.narrow_moments || !seeds.empty(),
                    "bfloat16 moments need seeds for their rounding");
  }
  for (size_t i = 0; i < n; ++i) {  // after the last check, so that nothing is half done
    Job& job = jobs[i];
    if (!job.options.update) continue;
    float& t = *reinterpret_cast<float*>(address(steps[i]));
    t += 1;
    job.step = i > 0 && jobs[i - 1].options.step == uint32_t(t)
                   ? jobs[i - 1].step
                   : step_numbers(t, lr, beta1, beta2, weight_decay, eps);
    job.options.step = uint32_t(t);
    job.options.seed = seeds.empty() ? 0 : uint64_t(seeds[i]);
  }
  Tensor result = over_chunks(chunks_of(sizes), blocks, sums ? n_blocks : 0, [&](const Chunk& c) {
    const Job& job = jobs[c.tensor];
    Sums found = {};
    adamw_chunk(job.dtype, job.from(c.begin), c.begin, c.count, job.options, job.step, found);
    return found;
  });
  if (skip) torch::stable::fill_(result, std::numeric_limits<double>::quiet_NaN());
  return result;
}

}  // namespace blocksched

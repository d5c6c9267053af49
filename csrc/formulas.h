// One definition of each formula, for the host and the device.
//
// T is float or double: what the numbers are computed in, whatever they are stored in.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define BS_FORMULA __host__ __device__ __forceinline__
#else
#define BS_FORMULA inline __attribute__((always_inline))
#endif

namespace blocksched {

// The fused layer y = x + fc2(relu(fc1(x s))^2), s = (mean(x^2) + eps)^-1/2 for each row of x.
//
// A row's scale folds out of the first product, u = fc1(x):  h = relu(s u)^2 = relu(fc1(x s))^2.
// Backward, with dh = fc2^T(dy):    dz = 2 sqrt(h) dh       (h gives relu(z) back as its root)
//                                   dw1 = (s dz)^T x        dw2 = dy^T h
//                                   dx = dy + s dz w1 - x s^2 / d (s dz w1) . x / s
// and the row's (s dz w1) . x / s = dz . z = 2 dh . h, so that it is known before the last product,
// whose accumulator then starts at dy - x s^2 / d (2 dh . h).

template <class T>
BS_FORMULA T row_scale(T mean_of_squares, T eps) {
  return T(1) / std::sqrt(mean_of_squares + eps);
}

template <class T>
BS_FORMULA T relu_squared(T u, T scale) {
  const T z = u * scale;
  const T r = z < T(0) ? T(0) : z;  // NaN stays NaN, as in torch
  return r * r;
}

// dh where the hidden unit was on. Elsewhere 0, even if dh is infinite.
template <class T>
BS_FORMULA T active_grad(T dh, T h) {
  return h <= T(0) ? T(0) : dh;
}

// s dz, of an active_grad.
template <class T>
BS_FORMULA T scaled_hidden_grad(T dh, T h, T scale) {
  return T(2) * dh * std::sqrt(h) * scale;
}

// The term of dz . z, of an active_grad.
template <class T>
BS_FORMULA T norm_dot(T dh, T h) {
  return T(2) * dh * h;
}

// What the last product adds s dz w1 to. `pull` is s^2 / d (dz . z).
template <class T>
BS_FORMULA T input_grad_start(T dy, T x, T pull) {
  return dy - x * pull;
}

// AdamW (arXiv 1711.05101), in the order of torch.optim.AdamW: blocksched/kernels/adamw.py.
template <class T>
struct AdamwStep {
  T decay;              // 1 - lr wd
  T weight1;            // 1 - b1
  T beta2, weight2;     // b2, 1 - b2
  T step_size, root;    // lr / (1 - b1^t), sqrt(1 - b2^t)
  T eps;
};

// m + (g - m) (1 - b1), as lerp: exact at both ends
template <class T>
BS_FORMULA T adamw_mean(T m, T g, const AdamwStep<T>& s) {
  const bool near = s.weight1 < T(0.5);
  return std::fma(near ? s.weight1 : s.weight1 - T(1), g - m, near ? m : g);
}

template <class T>
BS_FORMULA T adamw_mean_of_squares(T v, T g, const AdamwStep<T>& s) {
  return std::fma(s.weight2 * g, g, v * s.beta2);
}

// `x` is v, or with amsgrad the largest v so far.
template <class T>
BS_FORMULA T adamw_weight(T p, T m, T x, const AdamwStep<T>& s) {
  return p * s.decay + -s.step_size * m / (std::sqrt(x) / s.root + s.eps);
}

// Philox 4x32-10 (Salmon et al., 2011) at counter (four, step, 0, 0): the random words of the
// numbers 4 four .. 4 four + 3.
BS_FORMULA void philox(uint64_t seed, uint32_t four, uint32_t step, uint32_t words[4]) {
  uint32_t c0 = four, c1 = step, c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10  // or the loop around it is not vectorised
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53) * c0, b = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

}  // namespace blocksched

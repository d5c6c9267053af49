// The fused layer's passes on the CPU: rows in parallel, a row in tiles.
#include <torch/csrc/stable/ops.h>

#include "../formulas.h"
#include "lanes.h"

namespace blocksched {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // numbers a thread should have to be worth waking

// The rows [begin, end) of arrays that start at row 0.
BS_CLONES void row_scale_rows(Dtype dtype, const void* x, void* scale, int64_t begin, int64_t end,
                              int64_t width, double eps) {
  with_type(dtype, [=](auto kind) BS_INLINE_LAMBDA {
    using T = decltype(kind);
    using W = Wide<T>;
    W buffer[TILE];
    for (int64_t r = begin; r < end; ++r) {
      double squares = 0;
      for (int64_t at = 0; at < width; at += TILE) {
        const int64_t n = std::min(TILE, width - at);
        const W* a = widen(static_cast<const T*>(x) + r * width + at, buffer, n);
        squares += sum_of<W>(n, [a](int64_t i) BS_INLINE_LAMBDA { return a[i] * a[i]; });
      }
      static_cast<W*>(scale)[r] = row_scale(W(squares / double(width)), W(eps));
    }
  });
}

BS_CLONES void relu_squared_rows(Dtype dtype, void* u, const void* scale, int64_t begin,
                                 int64_t end, int64_t width) {
  with_type(dtype, [=](auto kind) BS_INLINE_LAMBDA {
    using T = decltype(kind);
    using W = Wide<T>;
    W buffer[TILE];
    for (int64_t r = begin; r < end; ++r) {
      const W s = static_cast<const W*>(scale)[r];
      for (int64_t at = 0; at < width; at += TILE) {
        const int64_t n = std::min(TILE, width - at);
        T* stored = static_cast<T*>(u) + r * width + at;
        W* a = widen(stored, buffer, n);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) a[i] = relu_squared(a[i], s);
        narrow(a, stored, n);
      }
    }
  });
}

BS_CLONES void hidden_backward_rows(Dtype dtype, void* dh, const void* h, const void* scale,
                                    void* dot, int64_t begin, int64_t end, int64_t width) {
  with_type(dtype, [=](auto kind) BS_INLINE_LAMBDA {
    using T = decltype(kind);
    using W = Wide<T>;
    W buffer[TILE], h_buffer[TILE];
    for (int64_t r = begin; r < end; ++r) {
      const W s = static_cast<const W*>(scale)[r];
      double total = 0;
      for (int64_t at = 0; at < width; at += TILE) {
        const int64_t n = std::min(TILE, width - at);
        T* stored = static_cast<T*>(dh) + r * width + at;
        W* a = widen(stored, buffer, n);
        const W* b = widen(static_cast<const T*>(h) + r * width + at, h_buffer, n);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) a[i] = active_grad(a[i], b[i]);
        if (dot != nullptr) {
          total += sum_of<W>(
              n, [a, b](int64_t i) BS_INLINE_LAMBDA { return norm_dot(a[i], b[i]); });
        }
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) a[i] = scaled_hidden_grad(a[i], b[i], s);
        narrow(a, stored, n);
      }
      if (dot != nullptr) static_cast<W*>(dot)[r] = W(total);
    }
  });
}

BS_CLONES void input_backward_rows(Dtype dtype, void* dx, const void* dy, const void* x,
                                   const void* scale, const void* dot, int64_t begin, int64_t end,
                                   int64_t width) {
  with_type(dtype, [=](auto kind) BS_INLINE_LAMBDA {
    using T = decltype(kind);
    using W = Wide<T>;
    W dx_buffer[TILE], dy_buffer[TILE], x_buffer[TILE];
    for (int64_t r = begin; r < end; ++r) {
      const W s = static_cast<const W*>(scale)[r];
      const W pull = s * s * static_cast<const W*>(dot)[r] / W(width);
      for (int64_t at = 0; at < width; at += TILE) {
        const int64_t n = std::min(TILE, width - at), place = r * width + at;
        W* out = widen(static_cast<T*>(dx) + place, dx_buffer, 0);
        const W* a = widen(static_cast<const T*>(x) + place, x_buffer, n);
        if (dy == nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) out[i] = input_grad_start(W(0), a[i], pull);
        } else {
          const W* g = widen(static_cast<const T*>(dy) + place, dy_buffer, n);
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) out[i] = input_grad_start(g[i], a[i], pull);
        }
        narrow(out, static_cast<T*>(dx) + place, n);
      }
    }
  });
}

template <class F>
const char* by_rows(int64_t rows, int64_t width, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / width), f);
  return nullptr;
}

}  // namespace

const Passes cpu_passes = {
    [](Dtype dtype, const void* x, void* scale, int64_t rows, int64_t width, double eps, void*) {
      return by_rows(rows, width, [=](int64_t begin, int64_t end) {
        row_scale_rows(dtype, x, scale, begin, end, width, eps);
      });
    },
    [](Dtype dtype, void* u, const void* scale, int64_t rows, int64_t width, void*) {
      return by_rows(rows, width, [=](int64_t begin, int64_t end) {
        relu_squared_rows(dtype, u, scale, begin, end, width);
      });
    },
    [](Dtype dtype, void* dh, const void* h, const void* scale, void* dot, int64_t rows,
       int64_t width, void*) {
      return by_rows(rows, width, [=](int64_t begin, int64_t end) {
        hidden_backward_rows(dtype, dh, h, scale, dot, begin, end, width);
      });
    },
    [](Dtype dtype, void* dx, const void* dy, const void* x, const void* scale, const void* dot,
       int64_t rows, int64_t width, void*) {
      return by_rows(rows, width, [=](int64_t begin, int64_t end) {
        input_backward_rows(dtype, dx, dy, x, scale, dot, begin, end, width);
      });
    },
};

}  // namespace blocksched

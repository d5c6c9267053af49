// What the fused layer does between its matrix products: four passes, on the CPU and on CUDA.
#pragma once

#include <cstdint>

namespace blocksched {

enum class Dtype { f32, f64, bf16, f16 };

// All arrays are dense and row-major, [rows, width] of `dtype`; `scale` and `dot` are [rows] of
// float (double for f64). Any number of rows, 0 included. `stream` is a cudaStream_t; the CPU has
// no use for it. Returns nullptr, or what went wrong.
struct Passes {
  // scale = (mean(x^2) + eps)^-1/2
  const char* (*row_scale)(Dtype dtype, const void* x, void* scale, int64_t rows, int64_t width,
                           double eps, void* stream);
  // u <- relu(scale u)^2
  const char* (*relu_squared)(Dtype dtype, void* u, const void* scale, int64_t rows, int64_t width,
                              void* stream);
  // dh <- scale dz; dot = dz . z of each row, unless it is nullptr
  const char* (*hidden_backward)(Dtype dtype, void* dh, const void* h, const void* scale, void* dot,
                                 int64_t rows, int64_t width, void* stream);
  // dx = dy - x scale^2 dot / width; dy is 0 where it is nullptr
  const char* (*input_backward)(Dtype dtype, void* dx, const void* dy, const void* x,
                                const void* scale, const void* dot, int64_t rows, int64_t width,
                                void* stream);
};

extern const Passes cpu_passes;
extern const Passes cuda_passes;

}  // namespace blocksched

// The fused layer's passes on CUDA. Each is bound by memory: it reads and writes every array once,
// in 16-byte accesses where the rows allow them. Sums have a fixed order, without atomics.
//
// nvcc's default contraction to fused multiply-adds stays on: it can only drop a rounding, and
// nothing asks for the CPU's bits.
#include "../mlp.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <initializer_list>
#include <type_traits>

#include "../formulas.h"

// A macro, so that a test can run the kernels without a GPU.
#ifndef BS_LAUNCH
#define BS_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace blocksched {
namespace {

constexpr int kThreads = 256;  // in a block, on one row or on several
constexpr int kWarp = 32;
constexpr int kAccess = 16;  // bytes

// What one thread reads or writes at a time: N values of Stored, computed in T.
template <class Stored, int N>
struct alignas(N * sizeof(Stored)) Pack {
  using S = Stored;
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  static constexpr int kSize = N;
  S of[N];
};

__device__ inline float computed(float value) { return value; }
__device__ inline double computed(double value) { return value; }
__device__ inline float computed(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float computed(__half value) { return __half2float(value); }

template <class S, class T>
__device__ S stored(T value) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

__device__ inline int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

// The sum over the threads of a row. To be called once, by the whole block: by the threads of a row
// beyond the last one too.
template <class T>
__device__ T row_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  if (blockDim.x == kWarp) return value;
  __shared__ T of_warp[kThreads / kWarp];
  const int warps = blockDim.x / kWarp;
  const int first = threadIdx.y * warps;
  if (threadIdx.x % kWarp == 0) of_warp[first + threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < warps; ++i) sum += of_warp[first + i];
  return sum;
}

// In the kernels a row is `packs` of P.

template <class P, class T = typename P::T>
__global__ void __launch_bounds__(kThreads)
    row_scale_kernel(const P* __restrict__ x, T* __restrict__ scale, int64_t rows, int64_t packs,
                     T eps) {
  const int64_t row = row_of_thread();
  T sum = 0;
  if (row < rows) {
#pragma unroll 4  // nothing is written, so the loads alone have to fill the memory's latency
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const P pack = x[row * packs + i];
      for (const auto& value : pack.of) sum += computed(value) * computed(value);
    }
  }
  sum = row_sum(sum);
  if (row < rows && threadIdx.x == 0) {
    scale[row] = row_scale(sum / static_cast<T>(packs * P::kSize), eps);
  }
}

template <class P, class T = typename P::T>
__global__ void __launch_bounds__(kThreads)
    relu_squared_kernel(P* __restrict__ u, const T* __restrict__ scale, int64_t rows,
                        int64_t packs) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  const T row_scale = scale[row];
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    P pack = u[row * packs + i];
    for (auto& value : pack.of) {
      value = stored<typename P::S>(relu_squared(computed(value), row_scale));
    }
    u[row * packs + i] = pack;
  }
}

template <class P, class T = typename P::T>
__global__ void __launch_bounds__(kThreads)
    hidden_backward_kernel(P* __restrict__ dh, const P* __restrict__ h,
                           const T* __restrict__ scale, T* __restrict__ dot, int64_t rows,
                           int64_t packs) {
  const int64_t row = row_of_thread();
  T sum = 0;
  if (row < rows) {
    const T row_scale = scale[row];
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      P grads = dh[row * packs + i];
      const P units = h[row * packs + i];
#pragma unroll
      for (int k = 0; k < P::kSize; ++k) {
        const T unit = computed(units.of[k]);
        const T grad = active_grad(computed(grads.of[k]), unit);
        sum += norm_dot(grad, unit);
        // About half of the units are off and their grad is 0 whatever the root, but the root of 0
        // would take the device's slow path for subnormal numbers.
        const T on = unit <= T(0) ? T(1) : unit;
        grads.of[k] = stored<typename P::S>(scaled_hidden_grad(grad, on, row_scale));
      }
      dh[row * packs + i] = grads;
    }
  }
  if (dot == nullptr) return;
  sum = row_sum(sum);
  if (row < rows && threadIdx.x == 0) dot[row] = sum;
}

template <class P, class T = typename P::T>
__global__ void __launch_bounds__(kThreads)
    input_backward_kernel(P* __restrict__ dx, const P* __restrict__ dy, const P* __restrict__ x,
                          const T* __restrict__ scale, const T* __restrict__ dot, int64_t rows,
                          int64_t packs) {
  const int64_t row = row_of_thread();
  if (row >= rows) return;
  const T pull = scale[row] * scale[row] * dot[row] / static_cast<T>(packs * P::kSize);
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    const P inputs = x[row * packs + i];
    P grads = {};
    if (dy != nullptr) grads = dy[row * packs + i];
#pragma unroll
    for (int k = 0; k < P::kSize; ++k) {
      grads.of[k] = stored<typename P::S>(
          input_grad_start(computed(grads.of[k]), computed(inputs.of[k]), pull));
    }
    dx[row * packs + i] = grads;
  }
}

// A row gets a warp, and more of them before a thread has more than 4 packs. 2048 threads with one
// 16-byte load each are 32 KiB on an SM; an H200's needs about 25 KiB under way (4.8 TB/s, 0.7 us).
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t rows, int64_t packs, void* stream,
                   Arguments... arguments) {
  int threads = kWarp;
  while (threads < kThreads && 4 * threads < packs) threads *= 2;
  const dim3 block(threads, kThreads / threads);
  const int64_t blocks = (rows + block.y - 1) / block.y;
  if (blocks == 0) return nullptr;  // CUDA calls an empty grid an error
  if (blocks > INT_MAX) return "more rows than a CUDA grid has blocks for";
  BS_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), block, stream, arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls pass(Pack): of 16 bytes where all rows of all arrays start at a multiple of them, else of
// one value.
template <class S, class Pass>
const char* with_pack(int64_t width, std::initializer_list<const void*> arrays, Pass pass) {
  constexpr int wide = kAccess / sizeof(S);
  bool aligned = width % wide == 0;
  for (const void* array : arrays) aligned &= reinterpret_cast<uintptr_t>(array) % kAccess == 0;
  return aligned ? pass(Pack<S, wide>()) : pass(Pack<S, 1>());
}

template <class Pass>
const char* with_dtype(Dtype dtype, int64_t width, std::initializer_list<const void*> arrays,
                       Pass pass) {
  switch (dtype) {
    case Dtype::f32: return with_pack<float>(width, arrays, pass);
    case Dtype::f64: return with_pack<double>(width, arrays, pass);
    case Dtype::bf16: return with_pack<__nv_bfloat16>(width, arrays, pass);
    case Dtype::f16: return with_pack<__half>(width, arrays, pass);
  }
  return "unknown dtype";
}

const char* row_scale_pass(Dtype dtype, const void* x, void* scale, int64_t rows, int64_t width,
                           double eps, void* stream) {
  return with_dtype(dtype, width, {x}, [=](auto pack) {
    using P = decltype(pack);
    using T = typename P::T;
    const int64_t packs = width / P::kSize;
    return launch(row_scale_kernel<P>, rows, packs, stream, static_cast<const P*>(x),
                  static_cast<T*>(scale), rows, packs, static_cast<T>(eps));
  });
}

const char* relu_squared_pass(Dtype dtype, void* u, const void* scale, int64_t rows, int64_t width,
                              void* stream) {
  return with_dtype(dtype, width, {u}, [=](auto pack) {
    using P = decltype(pack);
    const int64_t packs = width / P::kSize;
    return launch(relu_squared_kernel<P>, rows, packs, stream, static_cast<P*>(u),
                  static_cast<const typename P::T*>(scale), rows, packs);
  });
}

const char* hidden_backward_pass(Dtype dtype, void* dh, const void* h, const void* scale, void* dot,
                                 int64_t rows, int64_t width, void* stream) {
  return with_dtype(dtype, width, {dh, h}, [=](auto pack) {
    using P = decltype(pack);
    using T = typename P::T;
    const int64_t packs = width / P::kSize;
    return launch(hidden_backward_kernel<P>, rows, packs, stream, static_cast<P*>(dh),
                  static_cast<const P*>(h), static_cast<const T*>(scale), static_cast<T*>(dot),
                  rows, packs);
  });
}

const char* input_backward_pass(Dtype dtype, void* dx, const void* dy, const void* x,
                                const void* scale, const void* dot, int64_t rows, int64_t width,
                                void* stream) {
  return with_dtype(dtype, width, {dx, dy, x}, [=](auto pack) {
    using P = decltype(pack);
    using T = typename P::T;
    const int64_t packs = width / P::kSize;
    return launch(input_backward_kernel<P>, rows, packs, stream, static_cast<P*>(dx),
                  static_cast<const P*>(dy), static_cast<const P*>(x), static_cast<const T*>(scale),
                  static_cast<const T*>(dot), rows, packs);
  });
}

}  // namespace

const Passes cuda_passes = {row_scale_pass, relu_squared_pass, hidden_backward_pass,
                            input_backward_pass};

}  // namespace blocksched

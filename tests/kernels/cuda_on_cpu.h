// As much of CUDA as csrc/cuda needs, on the CPU: included before a .cu file that g++ compiles.
//
// Blocks run one after another; the threads of a block are fibers that switch at a barrier only, in
// order of their number, so what one of them lacks of another's writes is lacking every time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// Storage types. Rounded to nearest, ties to even; NaN becomes the NaN that a device writes.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __bfloat162float(__nv_bfloat16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = bits_as<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float size = std::ldexp(fraction + (exponent ? 1024.0f : 0.0f), (exponent ? exponent : 1) - 25);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return std::copysign(size, value.bits >> 15 ? -1.0f : 1.0f);
}
inline __half __float2half_rn(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), size = bits & 0x7fffffff;
  const float least_normal = 0x1p-14f, beyond_max = 65520;
  uint32_t half;
  if (std::isnan(value)) return {0x7fff};
  if (std::fabs(value) >= beyond_max) {
    half = 31 << 10;
  } else if (std::fabs(value) < least_normal) {
    half = static_cast<uint32_t>(std::nearbyint(std::fabs(value) * 0x1p24f));
  } else {
    half = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>((bits >> 31) << 15 | half)};
}

// The runtime.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
// What a test asks for, and what it can look at afterwards: block x, blocks, the stream.
extern "C" {
inline cudaError_t last_error = cudaSuccess;
inline int64_t first_block = 0;
inline int64_t launched[3];
}
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  char at = 0;  // 's'ync or shu'f'fle that it waits at, or 'd'one
  unsigned turn = 0;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers(1024);
inline unsigned current;
inline std::function<void()> body;

inline void wait_at(char what) {
  fibers[current].at = what;
  swapcontext(&fibers[current].context, &scheduler);
}

// All fibers have to come to the same barrier, or to their ends.
inline void step_all(unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    current = i;
    threadIdx = dim3(i % blockDim.x, i / blockDim.x);
    swapcontext(&scheduler, &fibers[i].context);
    if (fibers[i].at == fibers[0].at) continue;
    std::fprintf(stderr, "thread 0 waits at %c, thread %u at %c\n", fibers[0].at, i, fibers[i].at);
    std::abort();
  }
}

inline void __syncthreads() { wait_at('s'); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  static T slots[2][1024];  // in turn, so that nobody overwrites what is still to be read
  if (mask != 0xffffffffu || distance < 1 || distance > 31) std::abort();
  const unsigned me = current, turn = fibers[me].turn ^= 1;
  slots[turn][me] = value;
  wait_at('f');
  return slots[turn][me ^ distance];
}

inline void run_fiber() {
  for (;; wait_at('d')) body();
}

inline void run_blocks(dim3 grid, dim3 block, void* stream, std::function<void()> kernel) {
  const unsigned threads = block.x * block.y * block.z;
  launched[0] = block.x, launched[1] = grid.x;
  launched[2] = reinterpret_cast<intptr_t>(stream);
  if (grid.x == 0 || grid.x > INT32_MAX || threads == 0 || threads > 1024 || threads % 32) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  body = kernel, gridDim = grid, blockDim = block;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].at == 'd') continue;  // ready for the next block
    fibers[i].stack.resize(1 << 16);
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = fibers[i].stack.data();
    fibers[i].context.uc_stack.ss_size = fibers[i].stack.size();
    makecontext(&fibers[i].context, run_fiber, 0);
  }
  for (int64_t i = first_block; i < grid.x; ++i) {
    blockIdx = dim3(static_cast<unsigned>(i));
    do step_all(threads);
    while (fibers[0].at != 'd');
  }
}

#define BS_LAUNCH(kernel, grid, block, stream, ...) \
  run_blocks(grid, block, stream, [=] { kernel(__VA_ARGS__); })

// What every CPU loop shares: instruction sets, storage dtypes, and sums in a fixed order.
//
// Loops work on spans of at most TILE numbers in float (double for f64). widen() gives the span
// itself where that is how it is stored, else a copy in a buffer that stays in the L1 cache, and
// narrow() puts it back. So each formula is one plain loop, whatever the dtype.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../mlp.h"

// The same function for AVX-512, AVX2 and neither, chosen when the library is loaded. Nothing in a
// loop depends on the width of the vectors, so that all three give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define BS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BS_CLONES
#endif
#define BS_INLINE inline __attribute__((always_inline))
#define BS_INLINE_LAMBDA __attribute__((always_inline))

namespace blocksched {

constexpr int64_t TILE = 1024;
constexpr int LANES = 32;  // sums that do not wait for each other

template <class T>
constexpr bool is_wide = std::is_floating_point_v<T>;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What T is computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

BS_INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

BS_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

BS_INLINE float load(bf16 x) { return as_float(uint32_t(x.bits) << 16); }

BS_INLINE float load(f16 x) {
  const uint32_t magnitude = x.bits & 0x7fff;
  const float tiny = float(int32_t(magnitude)) * 0x1p-24f;  // so even if subnormals are flushed
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23);
  const uint32_t bits = magnitude < 0x400 ? as_bits(tiny) : normal;
  return as_float(bits | uint32_t(x.bits & 0x8000) << 16);
}

// To nearest, ties to even; NaN stays NaN.
BS_INLINE void store(bf16& out, float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

BS_INLINE void store(f16& out, float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000, bits = as_bits(x) & 0x7fffffff;
  const uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const uint32_t tiny = as_bits(as_float(bits) + 0.5f) - as_bits(0.5f);  // rounds at 2^-24
  const uint32_t finite = bits < (113u << 23) ? tiny : normal;
  const uint32_t huge = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  out.bits = uint16_t(sign | (bits >= 0x477ff000 ? huge : finite));
}

template <class W>
BS_INLINE W load(W x) {
  return x;
}

template <class W>
BS_INLINE void store(W& out, W x) {
  out = x;
}

// n <= TILE numbers of `stored` in what they are computed in.
template <class T>
BS_INLINE Wide<T>* widen(const T* stored, Wide<T>* buffer, int64_t n) {
  if constexpr (is_wide<T>) {
    return const_cast<T*>(stored);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = load(stored[i]);
    return buffer;
  }
}

// Puts back what widen() gave.
template <class T>
BS_INLINE void narrow(const Wide<T>* wide, T* stored, int64_t n) {
  if constexpr (!is_wide<T>) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(stored[i], wide[i]);
  }
}

// Calls f with a number of the storage dtype.
template <class F>
BS_INLINE void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
  }
}

// Calls f(i, lane) for i < n, with lanes 0, 1, .. LANES - 1, 0, 1, .. and ahead(i) before lane 0.
template <class F, class A>
BS_INLINE void by_lanes(int64_t n, const F& f, const A& ahead) {
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) {
    ahead(i);
#pragma omp simd
    for (int l = 0; l < LANES; ++l) f(i + l, l);
  }
  for (int64_t i = whole; i < n; ++i) f(i, int(i - whole));
}

template <class F>
BS_INLINE void by_lanes(int64_t n, const F& f) {
  by_lanes(n, f, [](int64_t) BS_INLINE_LAMBDA {});
}

// Asks for the LANES numbers that come 2 kB later, half a page: a processor follows a stream by
// itself, but not into the next page. It may lie beyond the array, where asking does nothing.
template <class T>
BS_INLINE void fetch(const T* from) {
  const char* at = reinterpret_cast<const char*>(from) + 2048;
  for (size_t line = 0; line < LANES * sizeof(T); line += 64) __builtin_prefetch(at + line);
}

// The lanes' sum, by halves: 5 additions that wait for each other, where one by one it were 32.
// Not inlined, since it would be in a hundred loops, which took g++ a third longer.
template <class T>
__attribute__((noinline)) double total(const T* lanes) {
  double sums[LANES];
  for (int l = 0; l < LANES; ++l) sums[l] = double(lanes[l]);
#pragma GCC unroll 5
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

// The sum of term(i) for i < n.
template <class T, class F>
BS_INLINE double sum_of(int64_t n, const F& term) {
  T lanes[LANES] = {};
  by_lanes(n, [&](int64_t i, int l) BS_INLINE_LAMBDA { lanes[l] += term(i); });
  return total(lanes);
}

}  // namespace blocksched

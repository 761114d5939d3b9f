// Vectors of OPCD_WIDTH floats through the vector extension of GCC and Clang: one source for every instruction set.
//
// Everything lives in a namespace named after the level, and no header of the C++ library is included: the same
// inline function compiled for AVX-512 and for AVX2 under one name would be merged by the linker, and the wrong
// one of the two would crash an older CPU.
#pragma once

#include <stdint.h>

namespace opcd {
namespace OPCD_LEVEL {

constexpr int WIDTH = OPCD_WIDTH;
typedef float Floats __attribute__((vector_size(4 * OPCD_WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * OPCD_WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * OPCD_WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * OPCD_WIDTH)));

constexpr float INFINITE = __builtin_inff();
constexpr float LOWEST = -3.40282347e38f;    // finite
constexpr float SMALLEST = 1.17549435e-38f;  // normal float32

inline Floats splat(float x) { return x - Floats{}; }

template <class Vector>
inline Vector read(const void* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector>
inline void write(void* to, Vector v) {
  __builtin_memcpy(to, &v, sizeof v);
}

inline Floats widen(Halves h) { return (Floats)(__builtin_convertvector(h, Bits) << 16); }

// To nearest even; NaN stays NaN.
inline Halves narrow(Floats x) {
  Bits bits = (Bits)x;
  Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Bits quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((Bits)(x == x ? (Ints)rounded : (Ints)quiet), Halves);
}

inline Floats magnitude(Floats x) { return (Floats)((Bits)x & 0x7fffffffu); }

inline double sum(Floats x) {
  double total = 0.0;
  for (int lane = 0; lane < WIDTH; ++lane) total += x[lane];
  return total;
}

inline float largest(Floats x) {
  float top = x[0];
  for (int lane = 1; lane < WIDTH; ++lane) top = x[lane] > top ? x[lane] : top;
  return top;
}

inline bool any(Ints mask) {
  int32_t found = 0;
  for (int lane = 0; lane < WIDTH; ++lane) found |= mask[lane];
  return found != 0;
}

// a - b - c - rest, where what a sum has lost to rounding is made up for (Knuth's two-sum): exact where a is near b + c.
inline Floats difference(Floats a, Floats b, float c, float rest) {
  const Floats sum = b + c, added = sum - b;
  const Floats lost = (b - (sum - added)) + (c - added);
  return (a - sum) - (lost + rest);
}

// e^x = 2^n (1 + r + r^2 P(r)), |r| <= ln2 / 2; P is a minimax fit of relative error 3e-9. For -87.3 < x <= 88.
struct Exponential {
  Floats power, rest;  // 2^n, and r + r^2 P(r)

  explicit Exponential(Floats x) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits; the 127 there is the exponent's bias.
    constexpr float ROUNDS = 12582912.0f + 127.0f;
    Floats shifted = x * 1.44269504f + ROUNDS;
    Floats n = shifted - ROUNDS;
    Floats r = x - n * 0.693359375f;  // 9 bits: exact without a fused multiply-add too
    r = r + n * 2.12194440e-4f;
    Floats poly = 0.00138144669f * r + 0.00836878051f;
    poly = poly * r + 0.0416683942f;
    poly = poly * r + 0.166665201f;
    poly = poly * r + 0.499999934f;
    rest = poly * (r * r) + r;
    power = (Floats)((Bits)shifted << 23);
  }
};

constexpr float UNDERFLOWS = -87.3365f;  // e^x is below the smallest normal number

// e^x for x <= 88 to 2 ulp; 0 where it underflows.
inline Floats exponential(Floats x) {
  const Exponential e(x);
  return x < UNDERFLOWS ? splat(0.0f) : e.rest * e.power + e.power;
}

// e^x - 1 for x <= 88 to 3 ulp.
inline Floats exponential_minus_one(Floats x) {
  const Exponential e(x);
  return x < UNDERFLOWS ? splat(-1.0f) : e.rest * e.power + (e.power - 1.0f);
}

// For m = rest a + w b, rest = 1 - w and l = log(a / b): what m / a is, and how much above 1, each without rounding of
// the other, since either may be next to nothing. |l| <= 88.
struct Mixture {
  Floats ratio, excess;

  Mixture(Floats l, float w, float rest) {
    const Exponential e(-l);
    ratio = (e.rest * e.power + e.power) * w + rest;
    excess = (e.rest * e.power + (e.power - 1.0f)) * w;
  }
};

// log(m / a) and m / a - 1 - log(m / a) to a few ulp each, for m / a from 1e-30 to 1e38.
// m / a = 2^k (1 + f), log(1 + f) = f - f^2 / 2 + f^3 Q(f); Q is a minimax fit of relative error 6e-8.
struct Logarithm {
  Floats log, excess;

  explicit Logarithm(Mixture m) {
    constexpr uint32_t ROOT_HALF = 0x3f3504f3u;
    const Floats u = m.excess;
    const Bits bits = (Bits)m.ratio;
    const Ints k = (Ints)(bits - ROOT_HALF) >> 23;
    const Floats mantissa = (Floats)(bits - ((Bits)k << 23));
    const Floats f = k == 0 ? u : mantissa - 1.0f;  // the ratio has rounded u
    Floats poly = -0.0778846356f * f + 0.127241572f;
    poly = poly * f - 0.130831839f;
    poly = poly * f + 0.142033212f;
    poly = poly * f - 0.166318349f;
    poly = poly * f + 0.200013662f;
    poly = poly * f - 0.250005648f;
    poly = poly * f + 0.333333281f;
    const Floats lost = f * f * (0.5f - poly * f);
    const Floats nan = u - u;  // or 0: the bits of a NaN make a mantissa like any other
    log = __builtin_convertvector(k, Floats) * 0.693147181f + (f - lost) + nan;
    excess = k == 0 ? lost : u - log;
  }
};

// Accurate near 0 too, where 2 / (1 + e^-2x) - 1 has lost its digits.
inline Floats hyperbolic_tangent(Floats x) {
  Floats square = x * x;
  Floats poly = -0.00570498502f * square + 0.0206390855f;
  poly = poly * square - 0.0537397146f;
  poly = poly * square + 0.133314422f;
  poly = poly * square - 0.333332819f;
  Floats near = poly * square * x + x;
  Floats size = magnitude(x);
  Floats far = 2.0f / (1.0f + exponential(-2.0f * size)) - 1.0f;
  far = x < 0.0f ? -far : far;
  return size < 0.625f ? near : far;
}

}  // namespace OPCD_LEVEL
}  // namespace opcd

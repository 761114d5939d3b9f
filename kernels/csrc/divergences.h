// The divergences, element by element. kernels/reference/divergences.py has the table of formulas and their sources.
//
// With l = log p - log q: value(p, q, l) are terms >= 0 whose sum is D, and p_phi(p, q, l) = p phi, from which
// dD/dz_s = p phi - p E_p[phi]. Where a probability underflows to 0, the terms are the limits.
#pragma once

#include "vec.h"

namespace opcd {
namespace OPCD_LEVEL {
namespace {

// b - a + a l for l = log(a / b), without cancellation: below 1/4 the series, of relative error 4e-7; above, what
// is left has lost at most a factor 30 of the precision. b where a is 0.
inline Floats kl_terms(Floats a, Floats b, Floats l) {
  Floats series = l * (1.0f / 720.0f) - 1.0f / 120.0f;
  series = series * l + 1.0f / 24.0f;
  series = series * l - 1.0f / 6.0f;
  series = series * l + 0.5f;
  return magnitude(l) < 0.25f ? series * (l * l) * a : b - a + a * l;
}

// |l| beyond which p or q has underflown; e^l is finite within.
inline Floats clamped(Floats l) {
  constexpr float LIMIT = 87.8f;
  l = LIMIT < l ? splat(LIMIT) : l;
  return -LIMIT > l ? splat(-LIMIT) : l;
}

struct ReverseKL {
  static constexpr bool MOMENT_IS_KNOWN = true;  // E_p[phi] needs no pass of its own
  explicit ReverseKL(float) {}
  Floats value(Floats p, Floats q, Floats l) const { return kl_terms(p, q, l); }
  Floats p_phi(Floats p, Floats, Floats l) const { return p * l; }
};

struct ForwardKL {
  static constexpr bool MOMENT_IS_KNOWN = true;
  explicit ForwardKL(float) {}
  Floats value(Floats p, Floats q, Floats l) const { return kl_terms(q, p, -l); }
  Floats p_phi(Floats p, Floats q, Floats l) const {
    return p < SMALLEST ? -q : -p * exponential_minus_one(-clamped(l));  // p - q, exact where they are close
  }
};

// (1 - gate) KL(p || q) + gate KL(q || p), with a constant gate.
struct GatedKL {
  static constexpr bool MOMENT_IS_KNOWN = true;
  const float gate, rest;
  GatedKL(float gate, float rest) : gate(gate), rest(rest) {}
  Floats value(Floats p, Floats q, Floats l) const { return rest * kl_terms(p, q, l) + gate * kl_terms(q, p, -l); }
  Floats p_phi(Floats p, Floats q, Floats l) const {
    return rest * (p * l) + gate * (p < SMALLEST ? -q : -p * exponential_minus_one(-clamped(l)));
  }
};

struct JSD {
  static constexpr bool MOMENT_IS_KNOWN = false;
  const float beta;
  explicit JSD(float beta) : beta(beta) {}
  Floats value(Floats p, Floats q, Floats l) const {
    l = clamped(l);
    const Floats from_p = p * Logarithm(beta * exponential_minus_one(-l)).excess;
    const Floats from_q = q * Logarithm((1.0f - beta) * exponential_minus_one(l)).excess;
    return (1.0f - beta) * (p < SMALLEST ? beta * q : from_p) + beta * (q < SMALLEST ? (1.0f - beta) * p : from_q);
  }
  Floats p_phi(Floats p, Floats, Floats l) const {
    return (beta - 1.0f) * p * Logarithm(beta * exponential_minus_one(-clamped(l))).log1p;
  }
};

struct SkewReverseKL {
  static constexpr bool MOMENT_IS_KNOWN = false;
  const float alpha;
  explicit SkewReverseKL(float alpha) : alpha(alpha) {}
  Floats over_m(Floats l) const { return (1.0f - alpha) * exponential_minus_one(-clamped(l)); }  // m / p - 1
  Floats value(Floats p, Floats q, Floats l) const {
    return p < SMALLEST ? (1.0f - alpha) * q : p * Logarithm(over_m(l)).excess;
  }
  Floats p_phi(Floats p, Floats, Floats l) const {
    const Floats u = over_m(l);
    return p * (alpha * u / one_plus(u) - Logarithm(u).log1p);
  }
};

struct SkewForwardKL {
  static constexpr bool MOMENT_IS_KNOWN = false;
  const float alpha;
  explicit SkewForwardKL(float alpha) : alpha(alpha) {}
  Floats over_m(Floats l) const { return (1.0f - alpha) * exponential_minus_one(clamped(l)); }  // m / q - 1
  Floats value(Floats p, Floats q, Floats l) const {
    return q < SMALLEST ? (1.0f - alpha) * p : q * Logarithm(over_m(l)).excess;
  }
  Floats p_phi(Floats p, Floats, Floats l) const {
    const Floats u = over_m(l);
    return (1.0f - alpha) * p * u / one_plus(u);
  }
};

}  // namespace
}  // namespace OPCD_LEVEL
}  // namespace opcd

// The divergences, element by element. kernels/reference/divergences.py has the table of formulas and their sources.
//
// With l = log p - log q: value(p, q, l) are terms >= 0 whose sum is D, and p_phi(p, q, d, l) = p phi, from which
// dD/dz_s = p phi - p E_p[phi]. d is l but for a constant of the row. Where a probability underflows to 0, the terms
// are the limits.
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
  Floats value(Floats p, Floats q, Floats l) const { return kl_terms(p, q, l); }
  Floats p_phi(Floats p, Floats, Floats d, Floats) const { return p * d; }
};

struct ForwardKL {
  static constexpr bool MOMENT_IS_KNOWN = true;
  Floats value(Floats p, Floats q, Floats l) const { return kl_terms(q, p, -l); }
  Floats p_phi(Floats p, Floats q, Floats, Floats l) const {
    return p < SMALLEST ? -q : -p * exponential_minus_one(-clamped(l));  // p - q, exact where they are close
  }
};

// (1 - gate) KL(p || q) + gate KL(q || p), with a constant gate.
struct GatedKL {
  static constexpr bool MOMENT_IS_KNOWN = true;
  const float gate, rest;
  GatedKL(float gate, float rest) : gate(gate), rest(rest) {}
  Floats value(Floats p, Floats q, Floats l) const { return rest * kl_terms(p, q, l) + gate * kl_terms(q, p, -l); }
  Floats p_phi(Floats p, Floats q, Floats d, Floats l) const {
    return rest * (p * d) + gate * (p < SMALLEST ? -q : -p * exponential_minus_one(-clamped(l)));
  }
};

struct JSD {
  static constexpr bool MOMENT_IS_KNOWN = false;
  const float beta, rest;
  JSD(float beta, float rest) : beta(beta), rest(rest) {}
  Floats value(Floats p, Floats q, Floats l) const {
    l = clamped(l);
    const Floats from_p = p * Logarithm(Mixture(l, beta, rest)).excess;
    const Floats from_q = q * Logarithm(Mixture(-l, rest, beta)).excess;
    return rest * (p < SMALLEST ? beta * q : from_p) + beta * (q < SMALLEST ? rest * p : from_q);
  }
  Floats p_phi(Floats p, Floats, Floats, Floats l) const {
    return p * (-rest * Logarithm(Mixture(clamped(l), beta, rest)).log);
  }
};

struct SkewReverseKL {
  static constexpr bool MOMENT_IS_KNOWN = false;
  const float alpha, rest;
  SkewReverseKL(float alpha, float rest) : alpha(alpha), rest(rest) {}
  Floats value(Floats p, Floats q, Floats l) const {
    return p < SMALLEST ? rest * q : p * Logarithm(Mixture(clamped(l), rest, alpha)).excess;
  }
  Floats p_phi(Floats p, Floats, Floats, Floats l) const {
    const Mixture m(clamped(l), rest, alpha);
    const Logarithm x(m);
    const Floats share = m.excess / m.ratio;
    return p * (magnitude(m.excess) < 0.5f ? x.excess - share * (m.excess + rest) : alpha * share - x.log);
  }
};

struct SkewForwardKL {
  static constexpr bool MOMENT_IS_KNOWN = false;
  const float alpha, rest;
  SkewForwardKL(float alpha, float rest) : alpha(alpha), rest(rest) {}
  Floats value(Floats p, Floats q, Floats l) const {
    return q < SMALLEST ? rest * p : q * Logarithm(Mixture(-clamped(l), rest, alpha)).excess;
  }
  Floats p_phi(Floats p, Floats, Floats, Floats l) const {
    const Mixture m(-clamped(l), rest, alpha);
    return rest * p * m.excess / m.ratio;
  }
};

}  // namespace
}  // namespace OPCD_LEVEL
}  // namespace opcd

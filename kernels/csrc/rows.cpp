// Statistics and gradient of a divergence from two rows of logits: the twin of kernels/reference/divergences.py, where
// the formulas are. Compiled once per instruction set.
//
// The reverse KL, and the forward one, read a row twice, in blocks that fit the first cache; the second time it still
// lies in the second. The first pass finds the maxima, the normalisers and E_p[z_s - z_t]; the second sums the
// divergence and writes G. So does the gated one, whose gate "tv" takes a pass of its own in between. The other
// divergences learn E_p[phi] only in the second pass and write G in a third. Sums
// run in float lanes within a block and in double across blocks, so that a row of 152 thousand columns loses no
// digits to its length.
#include "calls.h"
#include "divergences.h"
#include "row.h"

namespace opcd {
namespace OPCD_LEVEL {
namespace {

struct Work {
  const Row row_s, row_t;
  const FirstPass found;
  const Gradient gradient;
  float* const buffer_s;  // (BLOCK,)
  float* const buffer_t;
};

struct Sums {
  double value = 0.0, moment = 0.0;  // D, and E_p[phi]
};

// VALUE: sum both. WRITES: write G = (p phi - p moment) * row_factor.
template <bool VALUE, bool WRITES, class Divergence>
Sums pass(const Work& work, const Divergence& divergence, float moment) {
  const double exact_s = work.found.s.logsumexp(), exact_t = work.found.t.logsumexp();
  const float lse_s = float(exact_s), lse_t = float(exact_t);
  const float apart = work.found.apart;
  // The difference of two rounded ones errs by their rounding.
  const float log_ratio = float(exact_s - exact_t), rest = float(exact_s - exact_t - log_ratio);
  const int64_t columns = work.row_s.columns;
  alignas(64) float buffer_g[BLOCK];
  Sums sums;
  for (int64_t first = 0; first < columns; first += BLOCK) {
    const int64_t count = columns - first < BLOCK ? columns - first : BLOCK;
    const int64_t end = work.row_s.end_of_block(first);
    const float* z_s = work.row_s.logits(first, work.buffer_s);
    const float* z_t = work.row_t.logits(first, work.buffer_t);
    float* g = WRITES ? work.gradient.block(first, count, buffer_g) : nullptr;
    Floats value{}, moments{};
    for (int64_t i = 0; i < end; i += WIDTH) {
      const Floats x_s = read_logits(z_s + i), x_t = read_logits(z_t + i);
      const Floats p = exponential(x_s - lse_s), q = exponential(x_t - lse_t);
      const Floats d = x_s - (x_t + apart), l = difference(x_s, x_t, log_ratio, rest);
      if (VALUE) value += divergence.value(p, q, l);
      if (VALUE && !Divergence::MOMENT_IS_KNOWN) moments += divergence.p_phi(p, q, d, l);
      if (WRITES) write(g + i, (divergence.p_phi(p, q, d, l) - p * moment) * work.gradient.row_factor);
    }
    if (VALUE) sums.value += sum(value);
    if (VALUE && !Divergence::MOMENT_IS_KNOWN) sums.moment += sum(moments);
    if (WRITES) work.gradient.finish(first, count, g, z_s);
  }
  return sums;
}

// The value; the gradient where one is wanted. known_moment: E_p[phi] if the first pass has it.
template <class Divergence>
double passes(const Work& work, const Divergence& divergence, double known_moment) {
  if (work.gradient.to == nullptr) return pass<true, false>(work, divergence, 0.0f).value;
  if (Divergence::MOMENT_IS_KNOWN) return pass<true, true>(work, divergence, float(known_moment)).value;
  const Sums sums = pass<true, false>(work, divergence, 0.0f);
  pass<false, true>(work, divergence, float(sums.moment));
  return sums.value;
}

double total_variation(const Work& work, float lse_s, float lse_t) {
  double total = 0.0;
  for (int64_t first = 0; first < work.row_s.columns; first += BLOCK) {
    const int64_t end = work.row_s.end_of_block(first);
    const float* z_s = work.row_s.logits(first, work.buffer_s);
    const float* z_t = work.row_t.logits(first, work.buffer_t);
    Floats differences{};
    for (int64_t i = 0; i < end; i += WIDTH)
      differences += magnitude(exponential(read_logits(z_s + i) - lse_s) - exponential(read_logits(z_t + i) - lse_t));
    total += sum(differences);
  }
  return total / 2.0;
}

// reverse_kl: as the first pass knows it. Rounding may leave the gate outside of its range; NaN stays.
double gate_of(const Work& work, bool by_total_variation, double reverse_kl, float lse_s, float lse_t) {
  if (!(work.found.s.total > 0.0 && work.found.t.total > 0.0)) return __builtin_nan("");
  if (work.found.t.has_infinity && forbidden(work.row_s, lse_s, work.row_t, work.buffer_s, work.buffer_t)) return 1.0;
  if (!by_total_variation) return -::expm1(reverse_kl < 0.0 ? 0.0 : -reverse_kl);
  const double found = total_variation(work, lse_s, lse_t);
  return found > 1.0 ? 1.0 : found;
}

double value_and_gradient(const Work& work, const RowsCall& call, float* gate_statistic) {
  const int divergence = call.divergence;
  const FirstPass& found = work.found;
  const double lse_s = found.s.logsumexp(), lse_t = found.t.logsumexp();
  const double difference = found.weighted_difference / found.s.total + 0.0 * (lse_s - lse_t);  // NaN with an infinity
  const double reverse_kl = difference - (lse_s - lse_t - found.apart);
  double gate = 0.0;
  if (divergence == GATED_KL) {
    gate = gate_of(work, call.total_variation_gate, reverse_kl, float(lse_s), float(lse_t));
    if (call.all_statistics) *gate_statistic = float(gate);
  }
  bool infinite = false;
  if (found.s.total > 0.0 && found.t.total > 0.0) {
    if (divergence == REVERSE_KL && found.t.has_infinity)
      infinite = forbidden(work.row_s, float(lse_s), work.row_t, work.buffer_s, work.buffer_t);
    if ((divergence == FORWARD_KL || divergence == GATED_KL) && found.s.has_infinity)
      infinite = forbidden(work.row_t, float(lse_t), work.row_s, work.buffer_t, work.buffer_s);
  }
  if (infinite) {
    if (work.gradient.to != nullptr) work.gradient.clear(work.row_s.columns);
    return INFINITE;
  }
  switch (divergence) {
    case REVERSE_KL:
      return passes(work, ReverseKL(), difference);
    case FORWARD_KL:
      return passes(work, ForwardKL(), 0.0);
    case GATED_KL:  // closed for the reverse KL, it keeps even an infinite one out
      if (gate == 1.0) return passes(work, ForwardKL(), 0.0);
      return passes(work, GatedKL(float(gate), float(1.0 - gate)), (1.0 - gate) * difference);
    case JENSEN_SHANNON:
      return passes(work, JSD(call.parameter, call.remainder), 0.0);
    case SKEW_REVERSE_KL:
      return passes(work, SkewReverseKL(call.parameter, call.remainder), 0.0);
    case SKEW_FORWARD_KL:
      return passes(work, SkewForwardKL(call.parameter, call.remainder), 0.0);
    default:  // native.cpp lets no other through
      return __builtin_nan("");
  }
}

}  // namespace

void divergence_rows(const RowsCall& call, int64_t begin, int64_t end) {
  alignas(64) float buffer_s[BLOCK], buffer_t[BLOCK];
  for (int64_t n = begin; n < end; ++n) {
    const Row row_s(call.z_s, n * call.stride_s, call.bias_s, call.inner_s, call.outer_s, call.bf16_s,
                    call.softcap_s, call.columns);
    const Row row_t(call.z_t, n * call.stride_t, call.bias_t, call.inner_t, call.outer_t, call.bf16_t,
                    call.softcap_t, call.columns);
    FirstPass found;
    found.run(row_s, row_t, buffer_s, buffer_t);

    float* statistics = call.statistics + n;
    if (call.all_statistics) {
      const double lse_s = found.s.logsumexp(), lse_t = found.t.logsumexp();
      statistics[1 * call.stride_statistics] = float(::log(found.s.total) + found.weighted_depth / found.s.total);
      statistics[2 * call.stride_statistics] = float(lse_s);
      statistics[3 * call.stride_statistics] = float(lse_t);
      // Before the gradient may overwrite the student's logits. A row that is not a number has no top token.
      const bool same = found.s.top_column(row_s, buffer_s) == found.t.top_column(row_t, buffer_t);
      statistics[4 * call.stride_statistics] = lse_s == lse_s && lse_t == lse_t ? float(same) : __builtin_nanf("");
    }

    Gradient gradient{};
    if (call.gradient != nullptr) {
      gradient.bf16 = call.bf16_gradient;
      gradient.softcap = call.softcap_s;
      gradient.to = static_cast<char*>(call.gradient) + n * call.stride_gradient * (gradient.bf16 ? 2 : 4);
      gradient.row_factor = call.row_weights[n] * call.derivative;
      gradient.inverse_outer = 1.0f / call.outer_s;
    }
    const Work work{row_s, row_t, found, gradient, buffer_s, buffer_t};
    statistics[0] = float(value_and_gradient(work, call, statistics + 5 * call.stride_statistics));
  }
}

}  // namespace OPCD_LEVEL
}  // namespace opcd

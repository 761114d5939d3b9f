// One row of logits: reading it in blocks, its normaliser, and where its gradient goes.
#pragma once

#include "vec.h"

#include <math.h>

namespace opcd {
namespace OPCD_LEVEL {
namespace {

constexpr int64_t BLOCK = 1024;  // columns; two of float32 are 8 KB
constexpr float UNSEEN = -1.0e38f;  // a running maximum before its first finite logit
static_assert(BLOCK % WIDTH == 0, "a block is whole vectors");

// One row of one model.
struct Row {
  const char* z;
  const float* bias;
  float inner, outer;
  bool bf16, softcap;
  int64_t columns;

  Row(const void* base, int64_t offset, const float* bias, float inner, float outer, int bf16, int softcap,
      int64_t columns)
      : z(static_cast<const char*>(base) + offset * (bf16 ? 2 : 4)), bias(bias), inner(inner), outer(outer),
        bf16(bf16), softcap(softcap), columns(columns) {}

  // Logits / temperature of the block that starts at `first`, LOWEST beyond the last column: there p = q = 0 and
  // nothing is added to any sum. The pointer leads into the row itself where nothing has to be done to it.
  const float* logits(int64_t first, float* buffer) const {
    const int64_t count = columns - first < BLOCK ? columns - first : BLOCK;
    if (!bf16 && bias == nullptr && inner == 1.0f && !softcap && count == BLOCK)
      return reinterpret_cast<const float*>(z) + first;
    const int64_t whole = count - count % WIDTH;
    if (bf16) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(z) + first;
      for (int64_t i = 0; i < whole; i += WIDTH) write(buffer + i, widen(read<Halves>(from + i)));
      for (int64_t i = whole; i < count; ++i) {
        const uint32_t bits = uint32_t(from[i]) << 16;
        __builtin_memcpy(buffer + i, &bits, 4);
      }
    } else {
      __builtin_memcpy(buffer, reinterpret_cast<const float*>(z) + first, count * sizeof(float));
    }
    if (bias != nullptr) {
      for (int64_t i = 0; i < whole; i += WIDTH)
        write(buffer + i, read<Floats>(buffer + i) + read<Floats>(bias + first + i));
      for (int64_t i = whole; i < count; ++i) buffer[i] += bias[first + i];
    }
    const int64_t end = rounded(count);
    for (int64_t i = count; i < end; ++i) buffer[i] = 0.0f;
    if (softcap) {
      for (int64_t i = 0; i < end; i += WIDTH)
        write(buffer + i, hyperbolic_tangent(read<Floats>(buffer + i) * inner) * outer);
    } else if (inner != 1.0f) {
      for (int64_t i = 0; i < end; i += WIDTH) write(buffer + i, read<Floats>(buffer + i) * inner);
    }
    for (int64_t i = count; i < end; ++i) buffer[i] = LOWEST;
    return buffer;
  }

  static int64_t rounded(int64_t count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

  int64_t end_of_block(int64_t first) const { return columns - first < BLOCK ? rounded(columns - first) : BLOCK; }
};

// A logit as the sums read it. -inf becomes finite, so that p = 0 times a difference of logits is 0 and never NaN;
// NaN stays. (`forbidden` looks at the teacher's -inf apart, in the rare row that has one.)
inline Floats read_logits(const float* z) {
  const Floats x = read<Floats>(z);
  return LOWEST > x ? splat(LOWEST) : x;
}

struct Range {
  float low, high;  // of what is not NaN

  Range(const float* z, int64_t end) {
    Floats lowest = splat(INFINITE), highest = splat(-INFINITE);
    for (int64_t i = 0; i < end; i += WIDTH) {
      const Floats x = read<Floats>(z + i);
      lowest = x < lowest ? x : lowest;
      highest = x > highest ? x : highest;
    }
    low = -largest(-lowest);
    high = largest(highest);
  }
};

// Running maximum and sum of exponentials of one model.
struct Normaliser {
  double top = UNSEEN, total = 0.0;
  int64_t top_block = -1;  // where the maximum was first seen
  bool has_infinity = false;  // a logit is -inf

  // The factor by which sums made with the old maximum shrink.
  double extend(Range block, int64_t first) {
    has_infinity |= block.low == -INFINITE;
    if (!(block.high > top)) return 1.0;
    const double shrink = ::exp(top - block.high);
    top = block.high;
    top_block = first;
    total *= shrink;
    return shrink;
  }

  double logsumexp() const { return top + ::log(total); }

  int64_t top_column(const Row& row, float* buffer) const {
    if (top_block < 0) return -1;
    const float* z = row.logits(top_block, buffer);
    int64_t column = 0;
    while (z[column] != float(top)) ++column;
    return top_block + column;
  }
};

struct FirstPass {
  Normaliser s, t;
  // By how much the student's logit of its top token is above the teacher's. Differences are taken from there: small
  // for tokens that are said, they keep their digits however far the logits of the two models are apart.
  float apart = 0.0f;
  double weighted_difference = 0.0;  // sum of e^(z_s - top) (z_s - (z_t + apart))
  double weighted_depth = 0.0;       // sum of e^(z_s - top) (top - z_s), for the entropy

  void run(const Row& row_s, const Row& row_t, float* buffer_s, float* buffer_t) {
    for (int64_t first = 0; first < row_s.columns; first += BLOCK) {
      const int64_t end = row_s.end_of_block(first);
      const float* z_s = row_s.logits(first, buffer_s);
      const float* z_t = row_t.logits(first, buffer_t);
      const double old_top = s.top, old_total = s.total;
      const double shrink = s.extend(Range(z_s, end), first);
      weighted_difference *= shrink;
      weighted_depth = shrink * (weighted_depth + (s.top - old_top) * old_total);
      t.extend(Range(z_t, end), first);
      if (s.top_block == first) {
        int64_t column = 0;
        while (z_s[column] != float(s.top)) ++column;
        const float before = apart, found = float(s.top) - z_t[column];
        apart = -1.0e30f < found && found < 1.0e30f ? found : 0.0f;  // no sum with it overflows
        weighted_difference += (double(before) - apart) * s.total;
      }

      const float top_s = float(s.top), top_t = float(t.top);
      Floats sum_s{}, sum_t{}, differences{}, depths{};
      for (int64_t i = 0; i < end; i += WIDTH) {
        const Floats x_s = read_logits(z_s + i), x_t = read_logits(z_t + i);
        const Floats depth = top_s - x_s;
        const Floats e_s = exponential(-depth);
        sum_s += e_s;
        // 0 for what the teacher forbids: `forbidden` looks at it apart, where it matters.
        differences += read<Floats>(z_t + i) == -INFINITE ? Floats{} : e_s * (x_s - (x_t + apart));
        depths += e_s * depth;
        sum_t += exponential(x_t - top_t);
      }
      s.total += sum(sum_s);
      t.total += sum(sum_t);
      weighted_difference += sum(differences);
      weighted_depth += sum(depths);
    }
  }
};

// Where G of one row goes. The pass writes d(w D)/d(logits) of a block as float32 to `block`; `finish` does the rest.
struct Gradient {
  char* to;  // the row, or null
  bool bf16, softcap;
  float row_factor, inverse_outer;

  float* block(int64_t first, int64_t count, float* buffer) const {
    return !bf16 && count == BLOCK ? reinterpret_cast<float*>(to) + first : buffer;
  }

  // z: the block's logits, whose tanh is z / outer
  void finish(int64_t first, int64_t count, float* g, const float* z) const {
    if (softcap) {
      for (int64_t i = 0; i < count; i += WIDTH) {
        const Floats tanh = read<Floats>(z + i) * inverse_outer, x = read<Floats>(g + i);
        write(g + i, x - x * (tanh * tanh));
      }
    }
    if (bf16) {
      uint16_t* row = reinterpret_cast<uint16_t*>(to) + first;
      int64_t i = 0;
      for (; i + WIDTH <= count; i += WIDTH) write(row + i, narrow(read<Floats>(g + i)));
      if (i < count) {
        const Halves rest = narrow(read<Floats>(g + i));
        __builtin_memcpy(row + i, &rest, 2 * (count - i));
      }
    } else if (count != BLOCK) {
      __builtin_memcpy(reinterpret_cast<float*>(to) + first, g, 4 * count);
    }
  }

  void clear(int64_t columns) const { __builtin_memset(to, 0, columns * (bf16 ? 2 : 4)); }
};

// Whether the one side (`never`) gives probability 0 to a token that the other may say.
bool forbidden(const Row& may, float lse, const Row& never, float* buffer_may, float* buffer_never) {
  for (int64_t first = 0; first < may.columns; first += BLOCK) {
    const int64_t end = may.end_of_block(first);
    const float* z = may.logits(first, buffer_may);
    const float* z_never = never.logits(first, buffer_never);
    for (int64_t i = 0; i < end; i += WIDTH) {
      const Floats p = exponential(read_logits(z + i) - lse);
      if (any((Ints)(p >= SMALLEST) & (Ints)(read<Floats>(z_never + i) == -INFINITE))) return true;
    }
  }
  return false;
}

}  // namespace
}  // namespace OPCD_LEVEL
}  // namespace opcd

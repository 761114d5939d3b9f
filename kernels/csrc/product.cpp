// out = h @ weight.T for bf16 inputs with float32 accumulation. Compiled once per instruction set.
//
// The instruction this is made for multiplies pairs: every lane holds two neighbouring bf16 of one weight row, and
// both products go into the lane's float. So a panel of weight rows is packed pair by pair, once, and then all rows
// of h pass over it with their pairs broadcast. CPUs without the instruction run the same code with the pair
// widened and multiplied in float32.
#include "calls.h"
#include "vec.h"

#include <stdlib.h>
#if defined(OPCD_BF16_DOT)
#include <immintrin.h>
#endif

namespace opcd {
namespace OPCD_LEVEL {
namespace {

// Accumulators are ROWS x VECTORS registers, of 32 with AVX-512 and of 16 otherwise.
constexpr int VECTORS = 2;
constexpr int ROWS = OPCD_WIDTH == 16 ? 12 : 4;
constexpr int COLUMNS = VECTORS * WIDTH;

#if defined(OPCD_BF16_DOT)
struct Dot {
  static Floats add(Floats sum, Bits a, Bits b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
struct Dot {
  static Floats add(Floats sum, Bits a, Bits b) {
    sum += (Floats)(a << 16) * (Floats)(b << 16);
    return sum + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
  }
};
#endif

inline uint32_t pair(const uint16_t* from) {
  uint32_t bits;
  __builtin_memcpy(&bits, from, 4);
  return bits;
}

// packed[k][column] = elements 2k and 2k + 1 of that weight row; 0 beyond the last row and after an odd last element.
void pack(const ProductCall& call, int64_t first, uint32_t* packed) {
  constexpr int64_t RUN = 16;  // pairs, so that what is written to stays in the first cache
  const int64_t whole = call.width / 2;
  for (int64_t start = 0; start < whole; start += RUN) {
    const int64_t stop = start + RUN < whole ? start + RUN : whole;
    for (int64_t column = 0; column < COLUMNS; ++column) {
      const bool inside = first + column < call.columns;
      const uint16_t* row = call.weight + (inside ? first + column : first) * call.stride_weight;
      for (int64_t k = start; k < stop; ++k) packed[k * COLUMNS + column] = inside ? pair(row + 2 * k) : 0u;
    }
  }
  if (call.width % 2 != 0) {
    for (int64_t column = 0; column < COLUMNS; ++column) {
      const bool inside = first + column < call.columns;
      packed[whole * COLUMNS + column] =
          inside ? call.weight[(first + column) * call.stride_weight + call.width - 1] : 0u;
    }
  }
}

template <class Dot>
void multiply(const ProductCall& call, int64_t first_row, int64_t first_column, const uint32_t* packed) {
  const int64_t rows = call.rows - first_row < ROWS ? call.rows - first_row : ROWS;
  const int64_t columns = call.columns - first_column < COLUMNS ? call.columns - first_column : COLUMNS;
  const uint16_t* h[ROWS];  // the last row again where there are fewer; those are not stored
  for (int r = 0; r < ROWS; ++r) h[r] = call.h + (first_row + (r < rows ? r : rows - 1)) * call.stride_h;

  Floats sums[ROWS][VECTORS] = {};
  const int64_t whole = call.width / 2;
  for (int64_t k = 0; k < whole; ++k) {
    Bits weights[VECTORS];
    for (int v = 0; v < VECTORS; ++v) weights[v] = read<Bits>(packed + k * COLUMNS + v * WIDTH);
    for (int r = 0; r < ROWS; ++r) {
      const Bits both = pair(h[r] + 2 * k) - Bits{};
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = Dot::add(sums[r][v], weights[v], both);
    }
  }
  if (call.width % 2 != 0) {
    for (int r = 0; r < ROWS; ++r) {
      const Bits last = uint32_t(h[r][call.width - 1]) - Bits{};
      for (int v = 0; v < VECTORS; ++v)
        sums[r][v] = Dot::add(sums[r][v], read<Bits>(packed + whole * COLUMNS + v * WIDTH), last);
    }
  }

  for (int r = 0; r < rows; ++r) {
    float* to = call.out + (first_row + r) * call.stride_out + first_column;
    if (columns == COLUMNS) {
      for (int v = 0; v < VECTORS; ++v) write(to + v * WIDTH, sums[r][v]);
    } else {
      __builtin_memcpy(to, sums[r], columns * sizeof(float));
    }
  }
}

}  // namespace

extern const int64_t PANEL;
const int64_t PANEL = COLUMNS;

bool product(const ProductCall& call, int64_t first_panel, int64_t last_panel) {
  constexpr uintptr_t LINE = 64;
  void* memory = ::malloc((call.width + 1) / 2 * COLUMNS * sizeof(uint32_t) + LINE);
  if (memory == nullptr) return false;
  uint32_t* packed = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(memory) + LINE - 1) / LINE * LINE);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    pack(call, panel * COLUMNS, packed);
    for (int64_t row = 0; row < call.rows; row += ROWS) multiply<Dot>(call, row, panel * COLUMNS, packed);
  }
  ::free(memory);
  return true;
}

}  // namespace OPCD_LEVEL
}  // namespace opcd

// What the C ABI (native.cpp) hands to the kernels, and the table of kernels that every instruction set fills in.
#pragma once

#include <stdint.h>

namespace opcd {

// The codes of DIVERGENCES in kernels/reference/table.py.
enum { REVERSE_KL, FORWARD_KL, JENSEN_SHANNON, SKEW_REVERSE_KL, SKEW_FORWARD_KL, GATED_KL, DIVERGENCES };

// A divergence of n rows of logits. Mirrored field by field by `RowsCall` in kernels/csrc/native.py.
struct RowsCall {
  const void* z_s;  // (n, columns) float32 or bf16, unit column stride
  const void* z_t;
  const float* bias_s;  // (columns,) or null
  const float* bias_t;
  const float* row_weights;  // (n,)
  float* statistics;         // (6, n), unit column stride
  void* gradient;            // (n, columns) float32 or bf16, or null; may be z_s where the dtypes agree
  int64_t rows, columns;
  int64_t stride_s, stride_t, stride_gradient, stride_statistics;  // elements
  // logits / temperature = inner * x, or outer * tanh(inner * x) with a softcap
  float inner_s, inner_t, outer_s, outer_t;
  float derivative;  // scale / temperature
  float parameter;   // beta of jsd, alpha of the skewed ones
  float remainder;   // 1 - parameter, which is more than 0 also where the parameter has been rounded to 1
  int32_t divergence;  // one of the enum above
  int32_t bf16_s, bf16_t, bf16_gradient;
  int32_t softcap_s, softcap_t;
  int32_t all_statistics;
  int32_t total_variation_gate;  // gated_kl: 1 for the gate "tv", 0 for "kl"
};

// out = h @ weight.T with float32 accumulation. Mirrored by `ProductCall` in kernels/csrc/native.py.
struct ProductCall {
  const uint16_t* h;       // (rows, width) bf16, unit column stride
  const uint16_t* weight;  // (columns, width) bf16, unit column stride
  float* out;              // (rows, columns), unit column stride
  int64_t rows, columns, width;
  int64_t stride_h, stride_weight, stride_out;  // elements
};

// Work on rows [first, last), or on panels of weight rows [first, last).
using RowsKernel = void (*)(const RowsCall&, int64_t first, int64_t last);
// false: no memory for a packed panel
using ProductKernel = bool (*)(const ProductCall&, int64_t first_panel, int64_t last_panel);

struct Level {
  RowsKernel rows;
  ProductKernel product;
  int64_t panel;  // weight rows a panel holds
};

// One per build of rows.cpp and product.cpp; CMakeLists.txt says which exist (avx512bf16 has no rows of its own).
#define OPCD_DECLARE_LEVEL(NAME)                               \
  namespace NAME {                                             \
  void divergence_rows(const RowsCall&, int64_t, int64_t);     \
  bool product(const ProductCall&, int64_t, int64_t);          \
  extern const int64_t PANEL;                                  \
  }
OPCD_DECLARE_LEVEL(portable)
OPCD_DECLARE_LEVEL(avx2)
OPCD_DECLARE_LEVEL(avx512)
OPCD_DECLARE_LEVEL(avx512bf16)
#undef OPCD_DECLARE_LEVEL

}  // namespace opcd

// Calls the CPU library as kernels/csrc/native.py does, on random shapes, strides and options, from buffers that end
// where their last number ends. Meant for a build with sanitizers, which see a read or a write beyond, a race between
// threads, or arithmetic that C++ leaves undefined: `make sanitize`, `make tsan`.
//
//     native_calls [calls] [seed]
#include "../../kernels/csrc/calls.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

extern "C" {
int opcd_native_abi();
int opcd_native_has_level(int level);
int opcd_native_divergence_rows(const opcd::RowsCall* call, int level, int threads);
int opcd_native_product(const opcd::ProductCall* call, int level, int threads);
}

namespace {

std::mt19937_64 engine;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
bool chance(double p) { return std::bernoulli_distribution(p)(engine); }

// Rows of numbers, float32 or bf16, `stride` elements apart; the last row has no rest.
struct Matrix {
  int64_t rows, columns, stride;
  bool bf16;
  std::unique_ptr<char[]> bytes;

  Matrix(int64_t rows, int64_t columns, bool bf16, double infinities = 0.0)
      : rows(rows), columns(columns), stride(columns + (chance(0.5) ? 0 : between(1, 9))), bf16(bf16) {
    const int64_t count = rows == 0 ? 0 : (rows - 1) * stride + columns;
    bytes.reset(new char[count * (bf16 ? 2 : 4)]);
    std::normal_distribution<float> normal(0.0f, chance(0.2) ? 60.0f : 3.0f);
    for (int64_t i = 0; i < count; ++i) {
      const float x = i % stride != 0 && chance(infinities) ? -INFINITY : normal(engine);  // a row says something
      uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      const uint16_t half = uint16_t(bits >> 16);
      if (bf16) __builtin_memcpy(&bytes[2 * i], &half, 2);
      else __builtin_memcpy(&bytes[4 * i], &x, 4);
    }
  }
  float* numbers() const { return reinterpret_cast<float*>(bytes.get()); }
};

int64_t width() {
  const int64_t chosen[] = {1, 3, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2048, 2500};
  return chance(0.5) ? chosen[between(0, 11)] : between(1, 300);
}

bool rows_call(int level, int threads) {
  const int64_t rows = between(0, 9), columns = width();
  const double infinities = chance(0.2) ? 0.05 : 0.0;
  Matrix s(rows, columns, chance(0.3), infinities), t(rows, columns, chance(0.3), infinities);
  Matrix bias_s(1, columns, false), bias_t(1, columns, false), weights(1, rows, false), statistics(6, rows, false);
  const bool writes = chance(0.8), in_place = writes && chance(0.3);
  Matrix g(rows, columns, chance(0.4));
  opcd::RowsCall call{};
  call.z_s = s.bytes.get(), call.z_t = t.bytes.get();
  call.bias_s = chance(0.3) ? bias_s.numbers() : nullptr, call.bias_t = chance(0.3) ? bias_t.numbers() : nullptr;
  call.row_weights = weights.numbers(), call.statistics = statistics.numbers();
  const Matrix& to = in_place ? s : g;
  call.gradient = writes ? to.bytes.get() : nullptr;
  call.rows = rows, call.columns = columns;
  call.stride_s = s.stride, call.stride_t = t.stride, call.stride_gradient = to.stride;
  call.stride_statistics = statistics.stride;
  call.bf16_s = s.bf16, call.bf16_t = t.bf16, call.bf16_gradient = to.bf16;
  call.softcap_s = chance(0.3), call.softcap_t = chance(0.3);
  call.inner_s = chance(0.5) ? 1.0f : 0.7f, call.inner_t = chance(0.5) ? 1.0f : 1.3f;
  call.outer_s = 30.0f, call.outer_t = 20.0f, call.derivative = 0.5f;
  const double parameters[] = {0.5, 1e-8, 1.0 - 1e-8, 0.1};
  const double parameter = parameters[between(0, 3)];
  call.parameter = float(parameter), call.remainder = float(1.0 - parameter);
  call.divergence = int32_t(between(0, opcd::DIVERGENCES - 1));
  call.all_statistics = chance(0.7), call.total_variation_gate = chance(0.5);
  if (opcd_native_divergence_rows(&call, level, threads) != 0) return false;
  for (int64_t n = 0; n < rows; ++n)
    if (!(call.statistics[n] >= -1e-4f)) return false;  // NaN too
  return true;
}

bool product_call(int level, int threads) {
  const int64_t rows = between(0, 40), columns = between(0, 150), depth = between(0, 130);
  Matrix h(rows, depth, true), weight(columns, depth, true), out(rows, columns, false);
  opcd::ProductCall call{};
  call.h = reinterpret_cast<uint16_t*>(h.bytes.get()), call.weight = reinterpret_cast<uint16_t*>(weight.bytes.get());
  call.out = out.numbers();
  call.rows = rows, call.columns = columns, call.width = depth;
  call.stride_h = h.stride, call.stride_weight = weight.stride, call.stride_out = out.stride;
  return opcd_native_product(&call, level, threads) == 0;
}

}  // namespace

int main(int count, char** words) {
  const long calls = count > 1 ? std::atol(words[1]) : 2000;
  const unsigned long seed = count > 2 ? std::strtoul(words[2], nullptr, 10) : 0;
  engine.seed(seed);
  std::printf("ABI %d, %ld calls, seed %lu, levels:", opcd_native_abi(), calls, seed);
  int levels[4], known = 0;
  for (int level = 0; level < 4; ++level)
    if (opcd_native_has_level(level)) std::printf(" %d", levels[known++] = level);
  std::printf("\n");
  for (long number = 0; number < calls; ++number) {
    const int level = levels[between(0, known - 1)], threads = int(between(1, 4));
    if (!(chance(0.8) ? rows_call(level, threads) : product_call(level, threads))) {
      std::printf("call %ld at level %d went wrong\n", number, level);
      return 1;
    }
  }
  return 0;
}

// The C ABI of the CPU library: which instruction sets this build and this CPU share, and how work meets threads.
#include "calls.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_WIN32)
#define OPCD_API extern "C" __declspec(dllexport)
#else
#define OPCD_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

using opcd::Level;
using opcd::ProductCall;
using opcd::RowsCall;

// void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags), what compilers make of `omp parallel`.
using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);
OpenMP openmp = nullptr;

// Every thread takes the next piece until none is left. Which thread computes a piece changes nothing in it, so
// the result does not depend on their number.
template <class Work>
void in_parallel(int64_t items, int threads, Work work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t items, piece;
    Work& work;
    static void run(void* data) {
      Shared& shared = *static_cast<Shared*>(data);
      for (;;) {
        const int64_t first = shared.next.fetch_add(shared.piece);
        if (first >= shared.items) return;
        const int64_t last = first + shared.piece;
        shared.work(first, last < shared.items ? last : shared.items);
      }
    }
  };
  if (items <= 0) return;
  const int64_t pieces = int64_t(threads < 1 ? 1 : threads) * 16;  // enough that none waits long for the last
  Shared shared{{0}, items, (items + pieces - 1) / pieces, work};
  if (threads <= 1 || items == 1) return Shared::run(&shared);
  if (openmp != nullptr) return openmp(&Shared::run, &shared, unsigned(threads), 0);
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back(&Shared::run, &shared);
  } catch (const std::system_error&) {  // the system gives no more threads: those there are do all of it
  }
  Shared::run(&shared);
  for (std::thread& helper : helpers) helper.join();
}

struct Choice {
  Level level;
  bool supported;
};

#define OPCD_LEVEL_OF(ROWS, PRODUCT) \
  Level { &opcd::ROWS::divergence_rows, &opcd::PRODUCT::product, opcd::PRODUCT::PANEL }

// The numbers are those of LEVELS in kernels/csrc/native.py, in rising order: each includes what is before it.
Choice choose(int level) {
  switch (level) {
    case 0:
      return {OPCD_LEVEL_OF(portable, portable), true};
#if defined(OPCD_HAS_AVX2)
    case 1:
      return {OPCD_LEVEL_OF(avx2, avx2), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")};
#endif
#if defined(OPCD_HAS_AVX512)
    case 2:
      return {OPCD_LEVEL_OF(avx512, avx512), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")};
#endif
#if defined(OPCD_HAS_AVX512BF16)
    case 3:
      return {OPCD_LEVEL_OF(avx512, avx512bf16), choose(2).supported && __builtin_cpu_supports("avx512bf16")};
#endif
    default:
      return {{}, false};
  }
}

}  // namespace

// Rises whenever a signature or a struct of calls.h changes, so that a library left over from another version is
// not called.
OPCD_API int opcd_native_abi() { return 6; }

OPCD_API int opcd_native_has_level(int level) { return choose(level).supported; }

// Threads of the OpenMP runtime at `parallel` (its GOMP_parallel) from now on; null: threads of our own.
OPCD_API void opcd_native_use_openmp(void* parallel) { openmp = reinterpret_cast<OpenMP>(parallel); }

// 0; 1 when the CPU or this build lacks the level; 2 when this build does not know the divergence.
OPCD_API int opcd_native_divergence_rows(const RowsCall* call, int level, int threads) {
  if (call->divergence < 0 || call->divergence >= opcd::DIVERGENCES) return 2;
  const Choice choice = choose(level);
  if (!choice.supported) return 1;
  in_parallel(call->rows, threads,
              [&](int64_t first, int64_t last) { choice.level.rows(*call, first, last); });
  return 0;
}

// 0; 1 when the CPU or this build lacks the level; 2 without memory for the packed weights.
OPCD_API int opcd_native_product(const ProductCall* call, int level, int threads) {
  const Choice choice = choose(level);
  if (!choice.supported) return 1;
  std::atomic<bool> complete{true};
  const int64_t panels = (call->columns + choice.level.panel - 1) / choice.level.panel;
  in_parallel(panels, threads, [&](int64_t first, int64_t last) {
    if (!choice.level.product(*call, first, last)) complete = false;
  });
  return complete ? 0 : 2;
}

// C ABI of the CPU library. So far it only tells which ABI it speaks; the fused row kernel will live beside it.

#if defined(_WIN32)
#define OPCD_API extern "C" __declspec(dllexport)
#else
#define OPCD_API extern "C" __attribute__((visibility("default")))
#endif

// Rises whenever a signature changes, so that a library left over from another version is not called.
OPCD_API int opcd_native_abi() { return 1; }

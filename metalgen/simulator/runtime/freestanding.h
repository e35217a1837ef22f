// The few declarations that the runtime needs of a C library. It is built without any header of one,
// so that it builds in a second and loads into a process with any libc.
#pragma once
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;

extern "C" {
void *memcpy(void *, const void *, size_t);
void *memset(void *, int, size_t);
void *mmap(void *, size_t, int, int, int, long);
int munmap(void *, size_t);
int mprotect(void *, size_t, int);
int sigaction(int, const void *, void *);
int sigaltstack(const void *, void *);
int raise(int);
}

enum { kProtNone = 0, kProtReadWrite = 3 };
#if defined(__APPLE__)
enum { kMapPrivateAnonymous = 0x1002, kMapNoReserve = 0x0040 };
#else
enum { kMapPrivateAnonymous = 0x22, kMapNoReserve = 0x4000 };
#endif

#define MG_ALWAYS_INLINE inline __attribute__((always_inline))
#define MG_LIKELY(x) __builtin_expect(!!(x), 1)
#define MG_UNLIKELY(x) __builtin_expect(!!(x), 0)
#define MG_CALLER() ((uintptr_t)__builtin_return_address(0))

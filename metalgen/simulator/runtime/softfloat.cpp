// Conversions that clang calls for where the processor has no instruction of its own: to bfloat
// (always), and between half and float on x86-64 without F16C. Rounding is to nearest even.
#include "freestanding.h"

static inline uint16_t half_bits(float f) {
  uint32_t x = __builtin_bit_cast(uint32_t, f), sign = (x >> 16) & 0x8000, a = x & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (a < 0x38800000) {  // subnormal or zero: let float addition round
    float rounded = __builtin_bit_cast(float, a) + 0.5f;
    return (uint16_t)(sign | (__builtin_bit_cast(uint32_t, rounded) - 0x3f000000));
  }
  a += 0xc8000fffu + ((a >> 13) & 1);
  return (uint16_t)(sign | (a >> 13));
}
static inline float half_value(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
  if (e == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | (m << 13));
  if (e == 0) {
    float f = (float)m * 0x1p-24f;
    return sign ? -f : f;
  }
  return __builtin_bit_cast(float, sign | ((e + 112) << 23) | (m << 13));
}
static inline uint16_t bfloat_bits(float f) {
  uint32_t x = __builtin_bit_cast(uint32_t, f);
  if ((x & 0x7fffffff) > 0x7f800000) return (uint16_t)((x >> 16) | 0x40);
  return (uint16_t)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

#if !defined(__APPLE__)
extern "C" {
__bf16 __truncsfbf2(float f) { return __builtin_bit_cast(__bf16, bfloat_bits(f)); }
_Float16 __truncsfhf2(float f) { return __builtin_bit_cast(_Float16, half_bits(f)); }
float __extendhfsf2(_Float16 h) { return half_value(__builtin_bit_cast(uint16_t, h)); }
}
#endif

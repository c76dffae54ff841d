// Numbers of two types in one source: float32 or, where `half`, bfloat16; computed in float32.

#ifndef INLAY_NUMBERS_H
#define INLAY_NUMBERS_H

#include <stdint.h>
#include <string.h>

static inline float wide(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x to the last bit or two, in a form that compilers turn into vectors
static inline float expo(float x) {
    x = x < -87.3f ? -87.3f : x > 88.0f ? 88.0f : x;
    const float k = __builtin_floorf(x * 1.44269504f + 0.5f);
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)k + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

#define LOAD(from, i) (half ? wide(((const uint16_t *)(from))[i]) : ((const float *)(from))[i])
#define STORE(to, i, f) \
    do { if (half) ((uint16_t *)(to))[i] = narrow(f); else ((float *)(to))[i] = (f); } while (0)
// what is written is apart from what is read; a sum may be added up in any order
#define EACH _Pragma("omp simd")
#define SUM(name) _Pragma(STRING(omp simd reduction(+ : name)))
#define STRING(text) #text
// each loop is made for both types and both modes, so that none asks for them in it
#define MADE static inline __attribute__((always_inline)) void

#endif

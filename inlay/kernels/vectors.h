// Vectors of float32, and products of small matrices that stay in the cache.
//
// All products run along `units` of 32 bits: one float, or where the processor multiplies bfloat16
// (AVX512-BF16) a pair of neighbors along the summed dimension.

#ifndef INLAY_VECTORS_H
#define INLAY_VECTORS_H

#include <stdint.h>
#include <string.h>

#include "numbers.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define WIDE 1
#define W 16       // floats in a vector
#define PANEL 4    // vectors across a tile, which is 4 rows high: what the registers hold
#if defined(__AVX512BF16__)
#define PAIRS 1
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define W 8
#define PANEL 2
#else
#define W 4
#define PANEL 4
#endif

#define BLOCK 64   // tokens of one block
#define STEP 16    // columns that are computed or left out together
#define WIDEST 256 // numbers of a head at most
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t unit;

// --- numbers -----------------------------------------------------------------------------------

INLINE vec all(float x) { return x - (vec){}; }
INLINE vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec pick(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }
INLINE vec larger(vec a, vec b) {  // b where either is not a number
#ifdef WIDE
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return pick(a > b, a, b);
#endif
}
INLINE vec at_least(float low, vec x) { return larger(all(low), x); }

INLINE vec fused(vec a, vec b, vec c) {  // a b + c, rounded once where the processor can
#if defined(WIDE)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif W == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// 2^x; 0 far below -126; relative error 2e-7
INLINE vec exp2v(vec x) {
    const vec low = at_least(-200.0f, x);
    const vec magic = all(12582912.0f);                   // 1.5 * 2^23: adding it rounds
    const vec shifted = low + magic, f = low - (shifted - magic);
    vec p = all(1.5403530e-4f);
    p = fused(p, f, all(1.3333558e-3f));
    p = fused(p, f, all(9.6181291e-3f));
    p = fused(p, f, all(5.5504109e-2f));
    p = fused(p, f, all(2.4022651e-1f));
    p = fused(p, f, all(6.9314718e-1f));
    p = fused(p, f, all(1.0f));
#ifdef WIDE
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)(shifted - magic));
#else
    const ivec n = (ivec)shifted - (ivec)magic;
    return pick(x < all(-126.0f), all(0.0f), (vec)((ivec)p + (n << 23)));
#endif
}

INLINE vec tanhv(vec x) {
    const vec big = pick(x > all(9.0f), all(9.0f), at_least(-9.0f, x));
    const vec far = 1.0f - 2.0f / (exp2v(big * 2.8853900818f) + 1.0f), s = x * x;
    // near 0 the difference above would lose digits
    vec p = s * all(2.1869488e-2f) + all(-5.3968254e-2f);
    p = fused(p, s, all(1.3333333e-1f));
    p = fused(p, s, all(-3.3333333e-1f));
    const vec near = x + x * s * p;
    return pick(s < all(0.0625f), near, far);
}

// Vectors as bfloat16, where pairs are multiplied: two as the lower and upper halves of units, or
// one by itself.
INLINE void store_pair(vec a, vec b, unit *out) {
#ifdef PAIRS
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
    (void)a, (void)b, (void)out;
#endif
}

INLINE void store_bf16(vec a, uint16_t *out) {
#ifdef PAIRS
    _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh((__m512)a));
#else
    (void)a, (void)out;
#endif
}

// --- products ----------------------------------------------------------------------------------

INLINE vec multiply_add(int pairs, vec sum, unit a, vec b) {
#ifdef PAIRS
    if (pairs)
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    (void)pairs;
    float x;
    memcpy(&x, &a, 4);
    return fused(all(x), b, sum);
}

// c[4][nv * W] += or = a b over `k` units: a(r, p) at a[r * ar + p * ak], b(p, .) at b[p * ldb]
INLINE void tile(int pairs, int nv, const unit *a, int64_t ar, int64_t ak, const unit *b,
                 int64_t ldb, float *c, int64_t ldc, int64_t k, int add) {
    vec sum[4][PANEL];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) sum[r][v] = add ? load(c + r * ldc + v * W) : all(0.0f);
    for (int64_t p = 0; p < k; p++) {
        vec right[PANEL];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) right[v] = load((const float *)(b + p * ldb) + v * W);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const unit left = a[r * ar + p * ak];
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                sum[r][v] = multiply_add(pairs, sum[r][v], left, right[v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) store(c + r * ldc + v * W, sum[r][v]);
}

// the same for any `columns` that STEP divides
INLINE void tiles(int pairs, const unit *a, int64_t ar, int64_t ak, const unit *b, int64_t ldb,
                  float *c, int64_t ldc, int64_t k, int64_t columns, int add) {
    int64_t at = 0;
    for (; at + PANEL * W <= columns; at += PANEL * W)
        tile(pairs, PANEL, a, ar, ak, b + at, ldb, c + at, ldc, k, add);
#if PANEL * W > STEP
    switch ((columns - at) / W) {
    case 3: tile(pairs, 3, a, ar, ak, b + at, ldb, c + at, ldc, k, add); break;
    case 2: tile(pairs, 2, a, ar, ak, b + at, ldb, c + at, ldc, k, add); break;
    case 1: tile(pairs, 1, a, ar, ak, b + at, ldb, c + at, ldc, k, add); break;
    }
#endif
}

// two functions and no more, for compilers take their time over each
#define PRODUCT(name, pairs) \
    static __attribute__((noinline)) void name( \
        const unit *a, int64_t ar, int64_t ak, const unit *b, int64_t ldb, float *c, int64_t ldc, \
        int64_t k, int64_t columns, int add) { \
        tiles(pairs, a, ar, ak, b, ldb, c, ldc, k, columns, add); \
    }
PRODUCT(product_of_floats, 0)
PRODUCT(product_of_pairs, 1)

INLINE void product(int pairs, const unit *a, int64_t ar, int64_t ak, const unit *b, int64_t ldb,
                    float *c, int64_t ldc, int64_t k, int64_t columns, int add) {
    (pairs ? product_of_pairs : product_of_floats)(a, ar, ak, b, ldb, c, ldc, k, columns, add);
}

// --- packing -----------------------------------------------------------------------------------

// a head's tokens: `count` of `width` numbers, `stride` numbers apart; zeros after them
typedef struct {
    const char *at;
    int64_t stride, width, count, bf16;
    const float *cos, *sin;  // [count][width], by which they are rotated when packed; 0: they are not
} Tokens;

// the sum of what two heads have at a token, times each other
static float dot(const Tokens *a, const Tokens *b, int64_t row) {
    const int64_t size = a->bf16 ? 2 : 4, width = a->width;
    const char *left = a->at + row * a->stride * size, *right = b->at + row * b->stride * size;
    float sum = 0;
    if (a->bf16) {
        SUM(sum)
        for (int64_t d = 0; d < width; d++)
            sum += wide(((const uint16_t *)left)[d]) * wide(((const uint16_t *)right)[d]);
    } else {
        SUM(sum)
        for (int64_t d = 0; d < width; d++)
            sum += ((const float *)left)[d] * ((const float *)right)[d];
    }
    return sum;
}

// x cos + (-second half, first half of x) sin
MADE turn(const char *x, const float *cos, const float *sin, int64_t width, const int half,
          float *out) {
    const int64_t h = width / 2;
    EACH for (int64_t i = 0; i < h; i++) {
        const float a = LOAD(x, i), b = LOAD(x, i + h);
        out[i] = a * cos[i] - b * sin[i];
        out[i + h] = b * cos[i + h] + a * sin[i + h];
    }
}

static void turned(const Tokens *t, int64_t n, float *out) {
    const float *cos = t->cos + n * t->width, *sin = t->sin + n * t->width;
    const char *x = t->at + n * t->stride * (t->bf16 ? 2 : 4);
    if (t->bf16) turn(x, cos, sin, t->width, 1, out);
    else turn(x, cos, sin, t->width, 0, out);
}

// the gradient of what `turned` gives -> that of what it takes, in place: `count` rows of sums
static void turn_back(const float *cos, const float *sin, int64_t wide, int64_t count,
                      int64_t width, float *sums) {
    const int64_t h = width / 2;
    for (int64_t n = 0; n < count; n++, sums += wide, cos += width, sin += width)
        EACH for (int64_t i = 0; i < h; i++) {
            const float a = sums[i], b = sums[i + h];
            sums[i] = a * cos[i] + b * sin[i + h];
            sums[i + h] = b * cos[i + h] - a * sin[i];
        }
}

// [rows][units]: units along d
static void by_rows(int pairs, const Tokens *t, int64_t rows, int64_t units, unit *out) {
    for (int64_t n = 0; n < rows; n++, out += units) {
        const int64_t here = n < t->count ? t->width : 0;
        if (here && t->cos) {
            float x[WIDEST];
            turned(t, n, x);
            if (pairs)
                for (int64_t d = 0; d < here; d++) ((uint16_t *)out)[d] = narrow(x[d]);
            else
                memcpy(out, x, here * 4);
            const int64_t size = pairs ? 2 : 4;
            memset((char *)out + here * size, 0, units * 4 - here * size);
            continue;
        }
        if (pairs || !t->bf16) {
            const int64_t size = t->bf16 ? 2 : 4;
            memcpy(out, t->at + n * t->stride * size, here * size);
            memset((char *)out + here * size, 0, units * 4 - here * size);
            continue;
        }
        const uint16_t *from = (const uint16_t *)t->at + n * t->stride;
        for (int64_t d = 0; d < here; d++) out[d] = (unit)from[d] << 16;
        memset(out + here, 0, (units - here) * 4);
    }
}

// [units][BLOCK]: what by_rows made of a block, transposed
static void transposed(const unit *in, int64_t rows, int64_t units, unit *out) {
    for (int64_t n = 0; n < rows; n += 16)
        for (int64_t u = 0; u < units; u++)
            for (int64_t i = n; i < n + 16; i++) out[u * BLOCK + i] = in[i * units + u];
}

// [rows / 2][2 * units]: pairs along the tokens, in place of what by_rows made of pairs along d
static void by_pairs(int64_t rows, int64_t units, unit *out) {
    unit two[WIDEST];
    for (int64_t n = 0; n < rows; n += 2, out += 2 * units) {
        memcpy(two, out, 2 * units * sizeof(unit));
        for (int64_t u = 0; u < units; u++) {
            const unit a = two[u], b = two[u + units];
            out[2 * u] = (a & 0xffffu) | b << 16;
            out[2 * u + 1] = a >> 16 | (b & 0xffff0000u);
        }
    }
}

// `count` rows of sums -> numbers of `width`, `stride` numbers apart, each times scale[row] or scale
static void unpack(const float *sums, int64_t wide, int64_t count, int64_t width, int64_t stride,
                   int64_t bf16, const float *by, float scale, void *out, int64_t offset) {
    for (int64_t n = 0; n < count; n++, sums += wide, offset += stride) {
        const float factor = by ? by[n] : scale;
        if (bf16)
            for (int64_t d = 0; d < width; d++)
                ((uint16_t *)out)[offset + d] = narrow(sums[d] * factor);
        else
            for (int64_t d = 0; d < width; d++) ((float *)out)[offset + d] = sums[d] * factor;
    }
}

#endif

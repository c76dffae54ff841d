// 4-bit codes -> numbers: out[i] = table[code[i]] * absmax[i / block], two codes to a byte, the
// first in the high half.  absmax is given as floats, or doubly quantized:
// map[code8[b]] * nested[b / nested_block] + offset.
//
// Compiled without contraction into fused multiply-adds, so that each product and sum is rounded as
// the eager twin's is.  Blocks are shared out to threads.

#include "numbers.h"
#include "pool.h"

#if defined(__AVX512BW__) && defined(__AVX512F__)
#include <immintrin.h>
#define WIDE 1
#endif

typedef struct {
    const uint8_t *codes;        // [n / 2]
    const uint8_t *absmax8;      // [blocks], or null
    const float *absmax;         // [blocks], or null
    const float *map;            // [256]
    const float *nested;         // [blocks / nested_block]
    const float *table;          // [16]
    void *out;                   // [n]
    int64_t n, block, nested_block;
    float offset;
    int kind;                    // 0: float32, 1: bfloat16, 2: float16
} Work;

static inline uint16_t to_fp16(float value) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(value, 0);
#else
    _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
#endif
}

static inline float scale_of(const Work *w, int64_t b) {
    if (w->absmax) return w->absmax[b];
    return w->map[w->absmax8[b]] * w->nested[b / w->nested_block] + w->offset;
}

// `count` numbers of two bytes from `count / 2` codes
static void halves(const uint8_t *codes, const uint16_t *table, uint16_t *out, int64_t count) {
    int64_t i = 0;
#ifdef WIDE
    uint16_t twice[32];
    memcpy(twice, table, 32);
    memcpy(twice + 16, table, 32);
    const __m512i entries = _mm512_loadu_si512(twice);
    for (; i + 32 <= count; i += 32) {
        // a byte in each 32 bits: its high half to the low 16 (it comes first), its low half above
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i low = _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(15)), 16);
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), low);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, entries));
    }
#endif
    for (; i < count; i++) out[i] = table[i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
}

static void floats(const uint8_t *codes, const float *table, float *out, int64_t count) {
    int64_t i = 0;
#ifdef WIDE
    const __m512 entries = _mm512_loadu_ps(table);
    for (; i + 16 <= count; i += 16) {
        __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
        __m512i low = _mm512_slli_epi64(_mm512_and_si512(byte, _mm512_set1_epi64(15)), 32);
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), low);
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, entries));
    }
#endif
    for (; i < count; i++) out[i] = table[i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
}

static void blocks_of(const void *given, int64_t first, int64_t last) {
    const Work *w = given;
    for (int64_t b = first; b < last; b++) {
        const int64_t at = b * w->block;
        const int64_t count = at + w->block <= w->n ? w->block : w->n - at;
        const float scale = scale_of(w, b);
        float scaled[16];
        for (int k = 0; k < 16; k++) scaled[k] = w->table[k] * scale;
        if (w->kind == 0) {
            floats(w->codes + at / 2, scaled, (float *)w->out + at, count);
            continue;
        }
        uint16_t rounded[16];
        for (int k = 0; k < 16; k++)
            rounded[k] = w->kind == 1 ? narrow(scaled[k]) : to_fp16(scaled[k]);
        halves(w->codes + at / 2, rounded, (uint16_t *)w->out + at, count);
    }
}

void inlay_dequantize_4bit(const uint8_t *codes, const uint8_t *absmax8, const float *absmax,
                           const float *map, const float *nested, const float *table, void *out,
                           int64_t n, int64_t block, int64_t nested_block, float offset, int kind,
                           int threads) {
    const Work work = {codes, absmax8, absmax, map, nested, table, out, n, block, nested_block,
                       offset, kind};
    share_out(blocks_of, &work, (n + block - 1) / block, 65536 / block, threads);
}

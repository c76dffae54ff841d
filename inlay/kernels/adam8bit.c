// One step of AdamW over moments in 8 bits: codes -> numbers, the step, numbers -> codes, block by
// block, in one pass over the memory.  (Dettmers, arXiv:2110.02861)
//
//     m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
//     w = keep w - rate (m / (root sqrt(v) + eps))
//
// All in float32, whatever the type of w and g; each product and sum is rounded as the eager twin's.
// Blocks of all tensors are numbered through and shared out to threads.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "numbers.h"
#include "pool.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 256
#define PIECE 64  // blocks that a thread takes at a time

typedef struct {
    void *weights;               // [n], moved
    const void *grads;           // [n]
    uint8_t *first, *second;     // [n], codes of m and v
    float *first_max, *second_max;  // [ceil(n / BLOCK)]
    int64_t n, half;             // half: weights and grads are bfloat16, not float32
} Place;

typedef struct {
    float b1, rest1, b2, rest2, eps, keep, rate, root;
} Rule;

typedef struct {
    const float *signed_map, *unsigned_map;      // [256], the levels of the codes
    const uint32_t *signed_cells, *unsigned_cells;  // [65536]
    const Place *places;
    const Rule *rules;
    const int64_t *ends;                         // of each tensor's blocks
    int64_t count;
} Work;

static inline uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline uint32_t magnitude(float f) { return bits_of(f) & 0x7fffffff; }

// What the indices find in a table of words, two to a store: a processor stores less than it loads.
#define LOOK_UP(name, index)                                                             \
    static void name(const index *at, const void *table, void *out, int64_t count) {     \
        const uint32_t *words = table;                                                   \
        int64_t i = 0;                                                                   \
        _Pragma("GCC unroll 4") for (; i + 2 <= count; i += 2) {                         \
            const uint64_t one = words[at[i]], two = words[at[i + 1]];                   \
            uint64_t both = FIRST_IS_LOW ? one | two << 32 : two | one << 32;            \
            __asm__("" : "+r"(both)); /* no gathers: they take twice as long */          \
            memcpy((uint32_t *)out + i, &both, 8);                                       \
        }                                                                                \
        if (i < count) memcpy((uint32_t *)out + i, &words[at[i]], 4);                    \
    }
#define FIRST_IS_LOW (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
LOOK_UP(look_up_16, uint16_t)

#ifdef __AVX512F__
// the same for a table of 256 words, which 16 registers hold
static void look_up_8(const uint8_t *at, const float *table, float *out, int64_t count) {
    __m512 t[16];
    for (int k = 0; k < 16; k++) t[k] = _mm512_loadu_ps(table + 16 * k);
    for (int64_t i = 0; i < count; i += 16) {
        const int64_t left = count - i;
        uint8_t some[16] = {0};
        if (left < 16) memcpy(some, at + i, left);
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(left < 16 ? some : at + i));
        const __m512i c = _mm512_cvtepu8_epi32(bytes);
        __m512 found[8];  // of each 32 words, by the low 5 bits; the others choose among them
        for (int k = 0; k < 8; k++) found[k] = _mm512_permutex2var_ps(t[2 * k], c, t[2 * k + 1]);
        for (int bit = 5, many = 4; many; bit++, many /= 2) {
            const __mmask16 set = _mm512_test_epi32_mask(c, _mm512_set1_epi32(1 << bit));
            for (int k = 0; k < many; k++)
                found[k] = _mm512_mask_blend_ps(set, found[2 * k], found[2 * k + 1]);
        }
        _mm512_mask_storeu_ps(out + i, left < 16 ? (1 << left) - 1 : 0xffff, found[0]);
    }
}
#else
LOOK_UP(look_up_8, uint8_t)
#endif

// The code of the nearest level.  A cell is the floats that begin with the same 16 bits; it knows
// the code of its least (high half), and the 16 bits above which the next one is nearer.
static inline void pack(const float *x, float most, const uint32_t *cells, uint8_t *codes,
                        int64_t count, const int is_signed) {
    uint32_t bits[BLOCK], found[BLOCK];
    uint16_t begin[BLOCK];
    const float by = most < 1e-38f ? 1e-38f : most;
    EACH for (int64_t i = 0; i < count; i++) {
        bits[i] = bits_of(x[i] / by);
        begin[i] = (uint16_t)(bits[i] >> 16);
    }
    look_up_16(begin, cells, found, count);
    EACH for (int64_t i = 0; i < count; i++) {
        // of negative numbers the least has the largest bits
        const uint32_t flip = is_signed ? (uint32_t)((int32_t)bits[i] >> 31) : 0;
        const uint32_t place = (bits[i] ^ flip) & 0xffff;
        uint32_t code = (found[i] >> 16) + (place > (found[i] & 0xffff));
        // what is above 0 never becomes 0
        if (!is_signed) code = x[i] > 0 ? (code ? code : 1) : 0;
        codes[i] = (uint8_t)code;
    }
}

MADE block(const Work *w, const Place *p, const Rule *r, int64_t b, int64_t count,
           const int half) {
    float m[BLOCK], v[BLOCK];
    const int64_t at = b * BLOCK;
    const void *grads = (const char *)p->grads + at * (half ? 2 : 4);
    void *weights = (char *)p->weights + at * (half ? 2 : 4);
    const Rule k = *r;
    const float m_most = p->first_max[b], v_most = p->second_max[b];
    if (count == BLOCK)  // the next block comes while this one is computed
        for (int64_t i = 0; i < BLOCK * (half ? 2 : 4); i += 64) {
            __builtin_prefetch((const char *)grads + BLOCK * (half ? 2 : 4) + i);
            __builtin_prefetch((const char *)weights + BLOCK * (half ? 2 : 4) + i, 1);
        }
    look_up_8(p->first + at, w->signed_map, m, count);
    look_up_8(p->second + at, w->unsigned_map, v, count);
    uint32_t m_bits = 0, v_bits = 0;  // the largest, where what is not a number is larger than all
    _Pragma("omp simd reduction(max : m_bits, v_bits)") for (int64_t i = 0; i < count; i++) {
        const float g = LOAD(grads, i);
        m[i] = k.b1 * (m[i] * m_most) + k.rest1 * g;
        v[i] = k.b2 * (v[i] * v_most) + k.rest2 * (g * g);
        const float below = sqrtf(v[i]) * k.root + k.eps;
        const float moved = LOAD(weights, i) * k.keep - k.rate * (m[i] / below);
        STORE(weights, i, moved);
        m_bits = magnitude(m[i]) > m_bits ? magnitude(m[i]) : m_bits;
        v_bits = magnitude(v[i]) > v_bits ? magnitude(v[i]) : v_bits;
    }
    memcpy(&p->first_max[b], &m_bits, 4);
    memcpy(&p->second_max[b], &v_bits, 4);
    pack(m, p->first_max[b], w->signed_cells, p->first + at, count, 1);
    pack(v, p->second_max[b], w->unsigned_cells, p->second + at, count, 0);
}

// each is made for a whole block, so that its loops have no remainder
static void one_block(const Work *w, const Place *p, const Rule *r, int64_t b) {
    const int64_t left = p->n - b * BLOCK;
    if (left >= BLOCK && p->half) block(w, p, r, b, BLOCK, 1);
    else if (left >= BLOCK) block(w, p, r, b, BLOCK, 0);
    else if (p->half) block(w, p, r, b, left, 1);
    else block(w, p, r, b, left, 0);
}

static void run(const void *given, int64_t first, int64_t last) {
    const Work *w = given;
    int64_t low = 0, high = w->count;  // the first tensor that ends behind `first`
    while (low < high) {
        const int64_t t = (low + high) / 2;
        if (w->ends[t] > first) high = t;
        else low = t + 1;
    }
    int64_t t = low, start = t ? w->ends[t - 1] : 0;
    for (int64_t b = first; b < last; b++) {
        while (b >= w->ends[t]) start = w->ends[t++];
        one_block(w, &w->places[t], &w->rules[t], b - start);
    }
}

void inlay_adam8bit(const Place *places, const Rule *rules, const int64_t *ends, int64_t count,
                    const float *signed_map, const float *unsigned_map,
                    const uint32_t *signed_cells, const uint32_t *unsigned_cells, int threads) {
    Work w = {signed_map, unsigned_map, signed_cells, unsigned_cells, places, rules, ends, count};
    share_out(run, &w, count ? ends[count - 1] : 0, PIECE, threads);
}

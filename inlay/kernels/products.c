// x W^T + b and x W of bfloat16 x and W [O, I] in 4-bit codes, added up in float32.  W is never
// whole: a panel of it is made in the cache, of numbers rounded to bfloat16 as nf4.c rounds them,
// and multiplied there.
//
// This takes the instruction that adds two products of bfloat16 to a float in each of 16 lanes.
// The dimension that is summed over is cut into depths of DEPTH values, and what is multiplied is
// kept as
//     rows   [8][DEPTH]            of which one pair at a time goes to all lanes
//     lanes  [DEPTH / 2][32][2]    pairs side by side, or of 16 lanes where there are no more
//     sums   [8][32] floats        a tile
// For x W^T the rows are W's and the lanes x's, for x W the other way round.  Lanes of W hold, of
// each 32 values of a row, the 16 even ones and then the 16 odd ones.
//
// A processor with AMX is left alone: through oneDNN it multiplies many times as fast as this.

#include <stdint.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FITS 1
#endif

#if FITS && !defined(__AMX_BF16__)
#include <immintrin.h>
#include <string.h>

#include "pool.h"

// A depth of 32 lanes (16 KiB) stays in the first cache; a panel and its sums (at most 320 KiB) in
// the second, with a depth of a chunk's rows (256 KiB).
enum { DEPTH = 256, ROWS = 8, LANES = 32, CHUNK = 512, OUTPUTS = 64, INPUTS = 128 };
enum { TILE = ROWS * LANES, DEEP_ROWS = ROWS * DEPTH, DEEP_LANES = LANES * DEPTH };
#define UNROLLED(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

typedef struct {
    const uint8_t *codes;         // [O I / 2], the first of two in the high half
    const uint8_t *absmax8;       // [O I / block], or null
    const float *absmax;          // [O I / block], or null
    const float *map, *nested;    // [256], [blocks / nested block]
    const float *table;           // [16]
    int64_t outputs, inputs;      // of a block: a multiple
    int block_bits, nested_bits;  // a block is 1 << block_bits values, at least 32
    float offset;
} Weight;

typedef struct {
    const Weight *w;
    const uint16_t *x, *bias;     // [rows, I or O], [O] or null
    uint16_t *out;                // [rows, O or I]
    uint16_t *packed;             // x, depth by depth, as lanes or rows
    uint16_t *panels;             // for each thread, a panel of W and behind it its sums
    _Atomic uint64_t *taken;      // which of these are in use, a bit each
    int64_t rows;
} Work;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
static inline __m512i load(const void *from) { return _mm512_loadu_si512(from); }
static inline __m512i words(const uint8_t *bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)bytes));
}

// sums [8][16 wide] += rows [8][DEPTH] by lanes [pairs][16 wide][2]
static inline __attribute__((always_inline)) void tile(
    const int wide, const uint16_t *rows, const uint16_t *lanes, float *sums, int64_t pairs) {
    __m512 s[ROWS][2];
    UNROLLED(r, ROWS) UNROLLED(v, wide) s[r][v] = _mm512_loadu_ps(sums + (r * wide + v) * 16);
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh right[2];
        UNROLLED(v, wide) right[v] = (__m512bh)load(lanes + (p * wide + v) * 32);
        UNROLLED(r, ROWS) {
            int32_t pair;
            memcpy(&pair, rows + r * DEPTH + 2 * p, 4);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            UNROLLED(v, wide) s[r][v] = _mm512_dpbf16_ps(s[r][v], left, right[v]);
        }
    }
    UNROLLED(r, ROWS) UNROLLED(v, wide) _mm512_storeu_ps(sums + (r * wide + v) * 16, s[r][v]);
}

// 16 rows of 16 words -> 16 columns
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    UNROLLED(i, 8) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLLED(i, 4) UNROLLED(j, 2) {
        r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
        r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
    }
    UNROLLED(i, 2) UNROLLED(j, 4) {
        t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0x88);
        t[8 * i + j + 4] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + j + 4], 0xdd);
    }
    UNROLLED(j, 8) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

static inline int begins(const Weight *w, int64_t i) { return !(i & ((1ll << w->block_bits) - 1)); }

// the 16 numbers of the block that value i of row o is in
static inline __m256i numbers(const Weight *w, int64_t o, int64_t i) {
    const int64_t b = (o * w->inputs + i) >> w->block_bits;
    const float scale = w->absmax ? w->absmax[b]
        : w->map[w->absmax8[b]] * w->nested[b >> w->nested_bits] + w->offset;
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(w->table), _mm512_set1_ps(scale));
    return (__m256i)_mm512_cvtneps_pbh(scaled);
}

// rows first .. last of W, values i .. end of each, as rows
static void make_rows(const Weight *w, int64_t first, int64_t last, int64_t i, int64_t end,
                      uint16_t *panel) {
    for (int64_t o = first; o < last; o++, panel += DEPTH) {
        const uint8_t *codes = w->codes + o * w->inputs / 2;
        __m512i table = _mm512_setzero_si512();
        for (int64_t k = i; k < end; k += 32) {
            // the next depth's, one line of the cache at a time
            if (k % 128 == 0) _mm_prefetch(codes + (k + DEPTH) / 2, _MM_HINT_T1);
            if (k == i || begins(w, k)) table = _mm512_broadcast_i64x4(numbers(w, o, k));
            const __m512i byte = words(codes + k / 2);
            const __m512i low = _mm512_slli_epi32(byte, 16);  // its half comes second
            const __m512i code = _mm512_or_si512(_mm512_srli_epi32(byte, 4), low);
            const __m512i index = _mm512_and_si512(code, _mm512_set1_epi16(15));
            _mm512_storeu_si512(panel + k - i, _mm512_permutexvar_epi16(index, table));
        }
    }
}

// values i .. end of rows first .. last of W, as lanes
static void make_lanes(const Weight *w, int64_t first, int64_t last, int64_t i, int64_t end,
                       uint16_t *panel) {
    const __m512i low = _mm512_set1_epi32(0x0f000f), which = _mm512_set1_epi32(0x100000);
    const int64_t row = w->inputs / 2;
    for (int64_t o = first; o < last; o += 2, panel += 2 * LANES) {
        const int both = o + 1 < last;  // else zeros go with the last row
        const uint8_t *above = w->codes + o * row, *below = above + (both ? row : 0);
        _mm_prefetch(above + DEPTH * row + i / 2, _MM_HINT_T1);
        _mm_prefetch(below + DEPTH * row + i / 2, _MM_HINT_T1);
        __m512i table = _mm512_setzero_si512();
        for (int64_t k = i; k < end; k += 32) {
            if (k == i || begins(w, k)) {
                const __m256i other = both ? numbers(w, o + 1, k) : _mm256_setzero_si256();
                table = _mm512_inserti64x4(_mm512_castsi256_si512(numbers(w, o, k)), other, 1);
            }
            const __m512i bytes = _mm512_or_si512(words(above + k / 2),
                                                  _mm512_slli_epi32(words(below + k / 2), 16));
            // an index has the four bits of a code, and a fifth for which of the two rows it is of
            const __m512i fours = _mm512_and_si512(_mm512_srli_epi32(bytes, 4), low);
            const __m512i even = _mm512_or_si512(fours, which);
            const __m512i odd = _mm512_or_si512(_mm512_and_si512(bytes, low), which);
            uint16_t *to = panel + (k - i) * DEPTH;
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(even, table));
            _mm512_storeu_si512(to + 32, _mm512_permutexvar_epi16(odd, table));
        }
    }
}

// x [rows, I] as lanes, 16 rows a share
static void pack_lanes(const void *given, int64_t first, int64_t last) {
    const Work *t = given;
    const int64_t inputs = t->w->inputs, shares = parts(t->rows, 16);
    for (int64_t s = first; s < last; s++) {
        const int64_t many = least(16, t->rows - s * 16), stride = (s | 1) < shares ? 64 : 32;
        for (int64_t i = 0; i < inputs; i += 32) {
            __m512i r[16];
            for (int k = 0; k < 16; k++)
                r[k] = k < many ? load(t->x + (s * 16 + k) * inputs + i) : _mm512_setzero_si512();
            transpose(r);
            uint16_t *to = t->packed + (i / DEPTH * parts(shares, 2) + s / 2) * DEEP_LANES;
            for (int p = 0; p < 16; p++)
                _mm512_storeu_si512(to + (i % DEPTH / 2 + p) * stride + s % 2 * 32, r[p]);
        }
    }
}

// x [rows, O] as rows, 8 rows a share
static void pack_rows(const void *given, int64_t first, int64_t last) {
    const Work *t = given;
    const int64_t outputs = t->w->outputs, shares = parts(t->rows, ROWS);
    for (int64_t s = first; s < last; s++)
        for (int64_t o = 0; o < outputs; o += DEPTH)
            for (int64_t k = 0; k < ROWS; k++) {
                uint16_t *to = t->packed + (o / DEPTH * shares + s) * DEEP_ROWS + k * DEPTH;
                const int64_t many = s * ROWS + k < t->rows ? least(DEPTH, outputs - o) : 0;
                memcpy(to, t->x + (s * ROWS + k) * outputs + o, many * 2);
                memset(to + many, 0, (DEPTH - many) * 2);
            }
}

// outputs o .. o + 16 of all rows, from tiles of 8 outputs and 32 rows
static void store_outputs(const Work *t, const float *sums, int64_t o) {
    const int64_t outputs = t->w->outputs, tiles = parts(t->rows, LANES) * TILE;
    const __mmask16 mask = (__mmask16)((1u << least(16, outputs - o)) - 1);
    __m512i bias = _mm512_setzero_si512();
    if (t->bias) {
        const __m256i halves = _mm256_maskz_loadu_epi16(mask, t->bias + o);
        bias = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
    }
    for (int64_t n = 0; n < t->rows; n += 16) {
        const int64_t stride = t->rows - n / LANES * LANES > 16 ? 32 : 16;
        const float *from = sums + n / LANES * TILE + n % LANES;
        __m512i r[16];
        for (int k = 0; k < 16; k++) r[k] = load(from + k / ROWS * tiles + k % ROWS * stride);
        transpose(r);
        for (int k = 0; k < least(16, t->rows - n); k++) {
            const __m512 sum = _mm512_add_ps((__m512)r[k], (__m512)bias);
            _mm256_mask_storeu_epi16(t->out + (n + k) * outputs + o, mask,
                                     (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

// inputs i .. i + 32 of all rows, from tiles of 8 rows and 32 inputs
static void store_inputs(const Work *t, const float *sums, int64_t i) {
    for (int64_t n = 0; n < t->rows; n++, sums += LANES) {
        const __m256i even = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums));
        const __m256i odd = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + 16));
        const __m512i above = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
        _mm512_storeu_si512(t->out + n * t->w->inputs + i,
                            _mm512_or_si512(_mm512_cvtepu16_epi32(even), above));
    }
}

static int64_t packed_size(int64_t rows, int64_t width) {
    return parts(rows, LANES) * LANES * parts(width, DEPTH) * DEPTH;
}

static int64_t panel_size(int64_t rows) {
    return INPUTS * (DEPTH + parts(rows, LANES) * LANES * (int64_t)(sizeof(float) / 2));
}

static int take_panel(const Work *t) {
    uint64_t taken = *t->taken, free;
    do free = ~taken & (taken + 1);
    while (!atomic_compare_exchange_weak(t->taken, &taken, taken | free));
    return __builtin_ctzll(free);
}

static void give_back(const Work *t, int panel) { atomic_fetch_and(t->taken, ~(1ull << panel)); }

// x W^T + b, OUTPUTS columns of it a share
static void by_outputs(const void *given, int64_t begin, int64_t past) {
    const Work *t = given;
    const Weight *w = t->w;
    const int mine = take_panel(t);
    uint16_t *panel = t->panels + mine * panel_size(t->rows);
    float *sums = (float *)(panel + OUTPUTS * DEPTH);
    const int64_t groups = parts(t->rows, LANES);
    for (int64_t first = begin * OUTPUTS; first < past * OUTPUTS; first += OUTPUTS) {
        const int64_t last = least(first + OUTPUTS, w->outputs);
        memset(sums, 0, OUTPUTS * groups * LANES * sizeof(float));
        for (int64_t i = 0; i < w->inputs; i += DEPTH) {
            const int64_t end = least(i + DEPTH, w->inputs), pairs = (end - i) / 2;
            make_rows(w, first, last, i, end, panel);
            for (int64_t g = 0; g < groups; g++) {
                const uint16_t *lanes = t->packed + (i / DEPTH * groups + g) * DEEP_LANES;
                for (int64_t r = 0; r < parts(last - first, ROWS); r++) {
                    float *to = sums + (r * groups + g) * TILE;
                    if (t->rows - g * LANES > 16) tile(2, panel + r * DEEP_ROWS, lanes, to, pairs);
                    else tile(1, panel + r * DEEP_ROWS, lanes, to, pairs);
                }
            }
        }
        for (int64_t o = first; o < last; o += 16)
            store_outputs(t, sums + (o - first) / ROWS * groups * TILE, o);
    }
    give_back(t, mine);
}

// x W, INPUTS columns of it a share
static void by_inputs(const void *given, int64_t begin, int64_t past) {
    const Work *t = given;
    const Weight *w = t->w;
    const int mine = take_panel(t);
    uint16_t *panel = t->panels + mine * panel_size(t->rows);
    float *sums = (float *)(panel + INPUTS * DEPTH);
    const int64_t groups = parts(t->rows, ROWS);
    for (int64_t first = begin * INPUTS; first < past * INPUTS; first += INPUTS) {
        const int64_t last = least(first + INPUTS, w->inputs);
        memset(sums, 0, INPUTS * groups * ROWS * sizeof(float));
        for (int64_t o = 0; o < w->outputs; o += DEPTH) {
            const int64_t end = least(o + DEPTH, w->outputs), pairs = parts(end - o, 2);
            make_lanes(w, o, end, first, last, panel);
            for (int64_t v = 0; v < (last - first) / LANES; v++)
                for (int64_t g = 0; g < groups; g++) {
                    const uint16_t *rows = t->packed + (o / DEPTH * groups + g) * DEEP_ROWS;
                    tile(2, rows, panel + v * DEEP_LANES, sums + (v * groups + g) * TILE, pairs);
                }
        }
        for (int64_t i = first; i < last; i += LANES)
            store_inputs(t, sums + (i - first) / LANES * groups * TILE, i);
    }
    give_back(t, mine);
}

// Bytes that a product of x [rows, width] works in
int64_t inlay_product_room(int64_t rows, int64_t width, int threads) {
    const int64_t most = least(rows, CHUNK);
    return 2 * (packed_size(most, width) + least(threads, MOST_THREADS) * panel_size(most));
}

// out = x W^T + bias, or x W where it is transposed
void inlay_product(const uint8_t *codes, const uint8_t *absmax8, const float *absmax,
                   const float *map, const float *nested, const float *table, int64_t outputs,
                   int64_t inputs, int block_bits, int nested_bits, float offset, const uint16_t *x,
                   const uint16_t *bias, uint16_t *out, int64_t rows, int transposed,
                   uint16_t *room, int threads) {
    const Weight w = {codes, absmax8, absmax, map, nested, table, outputs, inputs,
                      block_bits, nested_bits, offset};
    const int64_t width = transposed ? outputs : inputs, columns = outputs + inputs - width;
    _Atomic uint64_t taken = 0;
    for (int64_t n = 0; n < rows; n += CHUNK) {
        const int64_t many = least(CHUNK, rows - n);
        const Work t = {&w, x + n * width, bias, out + n * columns, room,
                        room + packed_size(many, width), &taken, many};
        if (transposed) {
            share_out(pack_rows, &t, parts(many, ROWS), 1, threads);
            share_out(by_inputs, &t, parts(inputs, INPUTS), 1, threads);
        } else {
            share_out(pack_lanes, &t, parts(many, 16), 1, threads);
            share_out(by_outputs, &t, parts(outputs, OUTPUTS), 1, threads);
        }
    }
}
#else
const int inlay_unfit = 1;
#endif

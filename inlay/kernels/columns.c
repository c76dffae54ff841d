// y = x c with a factor for each column, and its gradients, in one pass each.
//
// x [rows, n] in float32 or, where `half`, bfloat16; c [n] in float32; sums in float32.

#include "numbers.h"
#include "pool.h"

#define BLOCK 64

typedef struct {
    const void *grad, *x;
    const float *factors;
    void *out;
    float *sums;
    int64_t rows, n;
} Work;

MADE times(const Work *w, int64_t first, int64_t last, const int half) {
    const void *x = w->x;
    const float *c = w->factors;
    void *out = w->out;
    const int64_t n = w->n;
    for (int64_t r = first; r < last; r++) {
        const int64_t at = r * n;
        EACH for (int64_t i = 0; i < n; i++) STORE(out, at + i, LOAD(x, at + i) * c[i]);
    }
}

// dx = dy c and dc = sum of dy x, of some blocks of columns
MADE back(const Work *w, int64_t first, int64_t last, const int half) {
    const void *grad = w->grad, *x = w->x;
    void *out = w->out;
    const int64_t n = w->n, rows = w->rows;
    for (int64_t block = first; block < last; block++) {
        const int64_t begin = block * BLOCK, size = begin + BLOCK < n ? BLOCK : n - begin;
        const float *c = w->factors + begin;
        float total[BLOCK] = {0};
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = r * n + begin;
            EACH for (int64_t i = 0; i < size; i++) {
                const float g = LOAD(grad, at + i);
                total[i] += g * LOAD(x, at + i);
                STORE(out, at + i, g * c[i]);
            }
        }
        memcpy(w->sums + begin, total, size * sizeof(float));
    }
}

#define OF_TYPE(name, type) \
    static void name##_##type(const void *w, int64_t a, int64_t b) { name(w, a, b, type); }
OF_TYPE(times, 0)
OF_TYPE(times, 1)
OF_TYPE(back, 0)
OF_TYPE(back, 1)

void inlay_columns(const void *x, const float *factors, void *out, int64_t rows, int64_t n, int half,
                   int threads) {
    const Work w = {.x = x, .factors = factors, .out = out, .rows = rows, .n = n};
    share_out(half ? times_1 : times_0, &w, rows, 16384 / n, threads);
}

void inlay_columns_back(const void *grad, const void *x, const float *factors, void *out,
                        float *sums, int64_t rows, int64_t n, int half, int threads) {
    const Work w = {grad, x, factors, out, sums, rows, n};
    share_out(half ? back_1 : back_0, &w, (n + BLOCK - 1) / BLOCK, 1 + 256 / (rows + 1), threads);
}

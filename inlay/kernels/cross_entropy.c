// Rows of logits z [rows, n] -> log softmax(z)[target], and in place of each row its gradient:
//
//     factor (1[v = target] - softmax(z)[v]) (1 - (z[v] / cap)^2)          a cap of 0: without it
//
// One row at a time, which stays in the second-level cache from the first pass to the last.

#include <math.h>

#include "numbers.h"
#include "pool.h"

#define BLOCK 1024  // numbers that are added up in float32; their sums are in float64

typedef struct {
    void *z;
    const int64_t *targets;
    const float *factors;  // [rows]
    float *out;            // [rows]
    int64_t n;
    float cap;
    int half, gradient;
} Work;

MADE row(const Work *w, int64_t r, const int half, const int gradient) {
    void *z = (char *)w->z + r * w->n * (half ? 2 : 4);
    const int64_t n = w->n, target = w->targets[r];
    float most = LOAD(z, 0);
    _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < n; i++) {
        const float x = LOAD(z, i);
        most = x > most ? x : most;
    }
    double sum = 0;
    for (int64_t b = 0; b < n; b += BLOCK) {
        const int64_t end = b + BLOCK < n ? b + BLOCK : n;
        float part = 0;
        SUM(part) for (int64_t i = b; i < end; i++) part += expo(LOAD(z, i) - most);
        sum += part;
    }
    const float given = LOAD(z, target), log_sum = most + (float)log(sum);
    w->out[r] = given - log_sum;
    if (!gradient) return;
    const float factor = w->factors[r], inverse = 1.0f / w->cap;
    const int capped = w->cap > 0;  // asked for each number: a logit of -inf times 0 is none
    EACH for (int64_t i = 0; i < n; i++) {
        const float x = LOAD(z, i), t = capped ? x * inverse : 0.0f;
        STORE(z, i, -factor * expo(x - log_sum) * (1.0f - t * t));
    }
    const float t = capped ? given * inverse : 0.0f;
    STORE(z, target, factor * (1.0f - expo(given - log_sum)) * (1.0f - t * t));
}

static void rows_of(const void *given, int64_t first, int64_t last) {
    const Work *w = given;
    for (int64_t r = first; r < last; r++) {
        if (w->half && w->gradient) row(w, r, 1, 1);
        else if (w->half) row(w, r, 1, 0);
        else if (w->gradient) row(w, r, 0, 1);
        else row(w, r, 0, 0);
    }
}

void inlay_log_softmax(void *z, const int64_t *targets, const float *factors, float *out,
                       int64_t rows, int64_t n, float cap, int gradient, int half, int threads) {
    const Work work = {z, targets, factors, out, n, cap, half, gradient};
    share_out(rows_of, &work, rows, 1 + 16384 / n, threads);
}

// What stands between a transformer's products, each in one pass: RMSNorm and a gate.
//
// Rows of n numbers in float32 or bfloat16; all sums in float32, rounded once to the type.
// In every function `half` says that the numbers are bfloat16.

#include <math.h>

#include "numbers.h"
#include "pool.h"

// rows 0 .. count over threads; `cost` is what a row is worth, in numbers
static void spread(Part part, const void *work, int64_t count, int64_t cost, int threads) {
    share_out(part, work, count, 16384 / cost, threads);
}

#define PARTS(name)                                                            \
    static void name##_parts(const void *given, int64_t first, int64_t last) { \
        const Work *w = given;                                                 \
        if (w->half && w->mode) name(w, first, last, 1, 1);                    \
        else if (w->half) name(w, first, last, 1, 0);                          \
        else if (w->mode) name(w, first, last, 0, 1);                          \
        else name(w, first, last, 0, 0);                                       \
    }

typedef struct {
    const void *a, *b, *c;  // read
    void *out, *out2;       // written
    float *sums;            // a number for each row
    int64_t n, a_step, b_step;  // of the gate: from a row of a or b to the next
    float eps;
    int half, mode;
} Work;

// --- y = x / rms(x) * w (mode 0, x / rms(x) rounded first), or * (1 + w) (mode 1) -----------------

MADE norm(const Work *w, int64_t first, int64_t last, const int half, const int mode) {
    const void *a = w->a, *b = w->b;
    void *out = w->out;
    const int64_t n = w->n;
    for (int64_t r = first; r < last; r++) {
        float sum = 0;
        SUM(sum) for (int64_t i = 0; i < n; i++) {
            const float x = LOAD(a, r * n + i);
            sum += x * x;
        }
        const float rstd = 1.0f / sqrtf(sum / (float)n + w->eps);
        w->sums[r] = rstd;
        if (mode) {
            EACH for (int64_t i = 0; i < n; i++)
                STORE(out, r * n + i, LOAD(a, r * n + i) * rstd * (1.0f + LOAD(b, i)));
            continue;
        }
        EACH for (int64_t i = 0; i < n; i++) {
            float x = LOAD(a, r * n + i) * rstd;
            if (half) x = wide(narrow(x));
            STORE(out, r * n + i, x * LOAD(b, i));
        }
    }
}
PARTS(norm)

// a = dy, b = w, c = x: dx = rstd (g - x/rms mean(g x/rms)), g = dy w
MADE norm_back(const Work *w, int64_t first, int64_t last, const int half, const int mode) {
    const void *a = w->a, *b = w->b, *c = w->c;
    void *out = w->out;
    const int64_t n = w->n;
    const float plus = mode ? 1.0f : 0.0f;
    for (int64_t r = first; r < last; r++) {
        const float rstd = w->sums[r];
        float dot = 0;
        SUM(dot) for (int64_t i = 0; i < n; i++)
            dot += LOAD(a, r * n + i) * (LOAD(b, i) + plus) * LOAD(c, r * n + i);
        const float shared = dot * rstd * rstd / (float)n;
        EACH for (int64_t i = 0; i < n; i++) {
            const float g = LOAD(a, r * n + i) * (LOAD(b, i) + plus);
            STORE(out, r * n + i, rstd * (g - shared * LOAD(c, r * n + i)));
        }
    }
}
PARTS(norm_back)

// --- h = f(e) g: f is silu (mode 0) or gelu by tanh (mode 1) --------------------------------------

MADE activated(float x, int mode, float *value, float *slope) {
    if (mode == 0) {
        const float s = 1.0f / (1.0f + expo(-x));
        *value = x * s;
        *slope = s * (1.0f + x * (1.0f - s));
        return;
    }
    const float k = 0.7978845608f, c = 0.044715f;
    // (1 + tanh u) / 2 is the sigmoid of 2u; beyond 20 it is 0 or 1, and squares stay finite
    const float v = x < -20.0f ? -20.0f : x > 20.0f ? 20.0f : x;
    const float s = 1.0f / (1.0f + expo(-2.0f * k * (v + c * v * v * v)));
    *value = x * s;
    *slope = s + 2.0f * k * v * s * (1.0f - s) * (1.0f + 3.0f * c * v * v);
}

// Nothing is kept in registers over all rows: gcc 12 keeps more than there are, and its loop over a
// row of f(e) g takes 1.3 to 1.8 times as long.
#define FENCE __asm__ volatile("" ::: "memory")

// a = e, b = g, which may be halves of one tensor
MADE gate(const Work *w, int64_t first, int64_t last, const int half, const int mode) {
    const int64_t n = w->n, size = half ? 2 : 4;
    for (int64_t r = first; r < last; r++) {
        const void *a = w->a + r * w->a_step * size, *b = w->b + r * w->b_step * size;
        void *out = w->out + r * n * size;
        FENCE;
        EACH for (int64_t i = 0; i < n; i++) {
            float f, slope;
            activated(LOAD(a, i), mode, &f, &slope);
            STORE(out, i, f * LOAD(b, i));
        }
    }
}
PARTS(gate)

// c = dh: de and dg
MADE gate_back(const Work *w, int64_t first, int64_t last, const int half, const int mode) {
    const int64_t n = w->n, size = half ? 2 : 4;
    for (int64_t r = first; r < last; r++) {
        const void *a = w->a + r * w->a_step * size, *b = w->b + r * w->b_step * size;
        const void *c = w->c + r * n * size;
        void *out = w->out + r * n * size, *out2 = w->out2 + r * n * size;
        EACH for (int64_t i = 0; i < n; i++) {
            float f, slope;
            activated(LOAD(a, i), mode, &f, &slope);
            const float grad = LOAD(c, i), up = LOAD(b, i);
            STORE(out, i, grad * up * slope);
            STORE(out2, i, grad * f);
        }
    }
}
PARTS(gate_back)

void inlay_norm(const void *x, const void *weight, void *out, float *rstd, int64_t rows, int64_t n,
                float eps, int mode, int half, int threads) {
    Work w = {.a = x, .b = weight, .out = out, .sums = rstd, .n = n, .eps = eps,
              .half = half, .mode = mode};
    spread(norm_parts, &w, rows, n, threads);
}

void inlay_norm_back(const void *grad, const void *weight, const void *x, void *out, float *rstd,
                     int64_t rows, int64_t n, int mode, int half, int threads) {
    Work w = {.a = grad, .b = weight, .c = x, .out = out, .sums = rstd, .n = n,
              .half = half, .mode = mode};
    spread(norm_back_parts, &w, rows, n, threads);
}

void inlay_gate(const void *e, const void *g, void *out, int64_t rows, int64_t n, int64_t e_step,
                int64_t g_step, int mode, int half, int threads) {
    Work w = {.a = e, .b = g, .out = out, .n = n, .a_step = e_step, .b_step = g_step,
              .half = half, .mode = mode};
    spread(gate_parts, &w, rows, n * 4, threads);
}

void inlay_gate_back(const void *e, const void *g, const void *grad, void *de, void *dg,
                     int64_t rows, int64_t n, int64_t e_step, int64_t g_step, int mode, int half,
                     int threads) {
    Work w = {.a = e, .b = g, .c = grad, .out = de, .out2 = dg, .n = n, .a_step = e_step,
              .b_step = g_step, .half = half, .mode = mode};
    spread(gate_back_parts, &w, rows, n * 4, threads);
}

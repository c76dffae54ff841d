// Causal attention of rows packed behind one another, forward and backward.
//
//     S = cap(Q K^T scale)   P = softmax(S) over keys n <= m, n > m - window, of the same row
//     O = P V                dS = P (dO V^T - sum(dO O)) cap'(S)
//     dV = P^T dO            dK = dS^T Q scale            dQ = dS K scale
//
// q [T, heads, D], k and v [T, kv_heads, D], m a query and n a key of one row (FlashAttention-2,
// arXiv:2307.08691, in blocks that stay in the second-level cache).  One task is a row and a head of
// keys, which are packed once for all heads of queries that share them.  Scores are computed
// transposed, [n][m], so that a softmax runs down whole vectors of queries, and what is masked is
// left out by STEPs of queries.  Where there is a rotation, queries and keys turn when they are
// packed, and their gradients turn back when they are written.

#include <math.h>

#include "pool.h"
#include "vectors.h"

#define CHUNK 512  // keys whose scores the forward pass keeps
#define LOG2E 1.4426950408889634f

typedef struct {
    const void *q, *k, *v, *grad, *out;       // grad is that of out; both for the backward pass
    void *o, *dq, *dk, *dv;                   // contiguous
    float *lse;                               // [heads, T], base 2
    const float *cos, *sin;                   // [tokens, width], by which q and k turn; 0: by none
    const int32_t *starts;                    // [rows + 1]
    const int32_t *order;                     // [rows], the longest first
    float *scratch;                           // threads * share
    int64_t rows, tokens, heads, kv_heads, width, window;  // a window of 0: none
    int64_t q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head;  // strides
    int64_t share;                            // floats of scratch of one thread
    int64_t bf16, pairs, backward, threads;
    float scale, cap;                         // a cap of 0: none
} Call;

// --- what sees what ----------------------------------------------------------------------------

// A block of queries [first, first + columns) of a row, padded to whole STEPs.
typedef struct { int64_t first, columns, window; } Block;

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// of the keys n .. n + 3: the columns [from, to) of the block with queries that see one of them
INLINE int64_t columns_from(const Block *b, int64_t n) {
    return n <= b->first ? 0 : (n - b->first) / STEP * STEP;
}
INLINE int64_t columns_to(const Block *b, int64_t n) {
    if (!b->window || n + 3 + b->window - b->first >= b->columns) return b->columns;
    return up(n + 3 + b->window - b->first, STEP);
}

// of the STEP queries in column c and after: the keys [from, to) that one of them sees
INLINE int64_t keys_from(const Block *b, int64_t c) {
    const int64_t n = b->first + c / STEP * STEP - b->window + 1;
    return !b->window || n < 0 ? 0 : n / 4 * 4;
}
INLINE int64_t keys_to(const Block *b, int64_t c) { return b->first + c / STEP * STEP + STEP; }

INLINE vec hide(const Block *b, int64_t n, int64_t c, vec x, float hidden) {
    const int64_t m = b->first + c;  // that of the first lane
    if (n <= m && (!b->window || n > m + W - 1 - b->window)) return x;
    ivec query, key = (int32_t)n - (ivec){};
    for (int i = 0; i < W; i++) query[i] = (int32_t)m + i;
    ivec seen = key <= query;
    if (b->window) seen &= key > query - (int32_t)b->window;
    return pick(seen, x, all(hidden));
}

// --- a task ------------------------------------------------------------------------------------

// A row and a head of keys.  Lengths in numbers; `deep` is the width in whole STEPs, `units` deep
// as units.
typedef struct {
    const Call *call;
    int64_t first, count, padded, head, deep, units;
    unit *keys, *values, *pairs;  // [padded][units]; pairs: keys, two tokens to a unit
    float *dk, *dv;               // [padded][deep]
    float *rest;
} Task;

static float *take(float **from, int64_t n) {
    float *found = *from;
    *from += up(n, 16);
    return found;
}

static Tokens tokens(const Task *t, const void *at, int64_t token, int64_t head, int64_t stride,
                     int64_t from, int64_t count) {
    const int64_t size = t->call->bf16 ? 2 : 4;
    const char *start = (const char *)at + ((t->first + from) * token + head * stride) * size;
    return (Tokens){start, token, t->call->width, count, t->call->bf16, 0, 0};
}

// those that a rotation turns
static Tokens turning(const Task *t, const void *at, int64_t token, int64_t head, int64_t stride,
                      int64_t from, int64_t count) {
    Tokens found = tokens(t, at, token, head, stride, from, count);
    if (!t->call->cos) return found;
    found.cos = t->call->cos + (t->first + from) * t->call->width;
    found.sin = t->call->sin + (t->first + from) * t->call->width;
    return found;
}

INLINE void scores(int pairs, const Task *t, const Block *b, const unit *rows, const unit *queries,
                   int64_t from, int64_t to, float *out) {
    for (int64_t n = from; n < to; n += 4) {
        const int64_t c0 = columns_from(b, n), c1 = columns_to(b, n);
        if (c0 < c1)
            product(pairs, rows + n * t->units, t->units, 1, queries + c0, BLOCK,
                    out + (n - from) * BLOCK + c0, BLOCK, t->units, c1 - c0, 0);
    }
}

// Scores of the keys [from, to) in column c -> what they weigh, beside the largest score so far;
// the sum of weights, and in `kept` by what the earlier sums are to be multiplied.
INLINE void weigh(int pairs, const Call *call, const Block *b, int64_t c, int64_t from, int64_t to,
                  float *s, unit *weights, float *most, float *sum, float *kept) {
    const float by = call->cap > 0 ? LOG2E : call->scale * LOG2E;
    vec top = load(most + c), total = all(0.0f);
    const vec before = top;
    for (int64_t n = from; n < to; n++) {
        float *at = s + n * BLOCK + c;
        vec x = load(at);
        if (call->cap > 0) x = call->cap * tanhv(x * (call->scale / call->cap));
        x = hide(b, n, c, x, -INFINITY);
        store(at, x);
        top = larger(x, top);
    }
    const vec down = top * by;
    for (int64_t n = from; n < to; n += 2) {
        const vec x = exp2v(load(s + n * BLOCK + c) * by - down);
        const vec y = exp2v(load(s + (n + 1) * BLOCK + c) * by - down);
        total += x + y;
        if (pairs) {
            store_pair(x, y, weights + n / 2 * BLOCK + c);
        } else {
            store((float *)weights + n * BLOCK + c, x);
            store((float *)weights + (n + 1) * BLOCK + c, y);
        }
    }
    const vec factor = exp2v((before - top) * by);
    store(most + c, top);
    store(sum + c, load(sum + c) * factor + total);
    store(kept + c, factor);
}

INLINE void forward_block(int pairs, const Task *t, int64_t head, int64_t first, unit *rows,
                          unit *queries, float *s, unit *weights, float *out) {
    const Call *call = t->call;
    const int64_t count = t->count - first < BLOCK ? t->count - first : BLOCK;
    const Block b = {first, up(count, STEP), call->window};
    const Tokens q = turning(t, call->q, call->q_token, head, call->q_head, first, count);
    float most[BLOCK], sum[BLOCK], kept[BLOCK];
    by_rows(pairs, &q, b.columns, t->units, rows);
    transposed(rows, b.columns, t->units, queries);
    memset(out, 0, b.columns * t->deep * sizeof(float));
    for (int64_t c = 0; c < b.columns; c++) most[c] = -1e30f, sum[c] = 0;  // -inf - -inf is NaN
    const int64_t last = first + b.columns;
    for (int64_t n0 = keys_from(&b, 0); n0 < last; n0 += CHUNK) {
        const int64_t n1 = n0 + CHUNK < last ? n0 + CHUNK : last;
        scores(pairs, t, &b, t->keys, queries, n0, n1, s);
        for (int64_t c = 0; c < b.columns; c += STEP) {
            const int64_t from = keys_from(&b, c) > n0 ? keys_from(&b, c) : n0;
            const int64_t to = keys_to(&b, c) < n1 ? keys_to(&b, c) : n1;
            if (from >= to) continue;
            // keys are counted from n0 below
            const Block near = {first - n0, b.columns, b.window};
            for (int64_t i = c; i < c + STEP; i += W)
                weigh(pairs, call, &near, i, from - n0, to - n0, s, weights, most, sum, kept);
            const int64_t at = pairs ? (from - n0) / 2 : from - n0;
            for (int64_t m = c; m < c + STEP; m += 4) {
                if (n0 > 0)
                    for (int64_t i = 0; i < 4 * t->deep; i++)
                        out[m * t->deep + i] *= kept[m + i / t->deep];
                product(pairs, weights + at * BLOCK + m, 1, BLOCK,
                        t->values + from / (1 + pairs) * t->deep, t->deep, out + m * t->deep,
                        t->deep, (to - from) / (1 + pairs), t->deep, 1);
            }
        }
    }
    float *lse = call->lse + head * call->tokens + t->first + first;
    const float by = call->cap > 0 ? LOG2E : call->scale * LOG2E;
    for (int64_t m = 0; m < count; m++) {
        lse[m] = most[m] * by + log2f(sum[m]);
        kept[m] = 1.0f / sum[m];
    }
    const int64_t stride = call->heads * call->width;
    unpack(out, t->deep, count, call->width, stride, call->bf16, kept, 1.0f, call->o,
           (t->first + first) * stride + head * call->width);
}

INLINE void forward(int pairs, Task *t) {
    const int64_t group = t->call->heads / t->call->kv_heads;
    unit *rows = (unit *)take(&t->rest, BLOCK * t->units);
    unit *queries = (unit *)take(&t->rest, BLOCK * t->units);
    float *out = take(&t->rest, BLOCK * t->deep);
    float *s = take(&t->rest, CHUNK * BLOCK);
    unit *weights = pairs ? (unit *)take(&t->rest, CHUNK / 2 * BLOCK) : (unit *)s;
    if (pairs) by_pairs(t->padded, t->units, t->values);
    for (int64_t h = t->head * group; h < (t->head + 1) * group; h++)
        for (int64_t first = 0; first < t->count; first += BLOCK)
            forward_block(pairs, t, h, first, rows, queries, s, weights, out);
}

// Scores s and dP [n][m] of two keys -> P and dS in place, or as pairs along m (p, ds) and n (dsn).
INLINE void backward_pair(int pairs, const Call *call, const Block *b, int64_t n, int64_t row,
                          const float *lse, const float *delta, float *s, float *d, unit *p,
                          unit *ds, unit *dsn) {
    const int64_t c0 = columns_from(b, n / 4 * 4), c1 = columns_to(b, n / 4 * 4);
    const float by = call->scale * LOG2E;
    for (int64_t c = c0; c < c1; c += W) {
        vec weight[2], slope[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const int64_t at = (row + i) * BLOCK + c;
            vec x = load(s + at), bend = all(1.0f);
            if (call->cap > 0) {
                const vec t = tanhv(x * (call->scale / call->cap));
                x = t * (call->cap * LOG2E), bend = 1.0f - t * t;
            } else {
                x = x * by;
            }
            weight[i] = hide(b, n + i, c, exp2v(x - load(lse + c)), 0.0f);
            slope[i] = weight[i] * (load(d + at) - load(delta + c));
            if (call->cap > 0) slope[i] *= bend;
            if (pairs) {
                store_bf16(weight[i], (uint16_t *)p + at);
                store_bf16(slope[i], (uint16_t *)ds + at);
            } else {
                store(s + at, weight[i]);
                store(d + at, slope[i]);
            }
        }
        if (pairs) store_pair(slope[0], slope[1], dsn + row / 2 * BLOCK + c);
    }
}

// What a block of queries shares with all blocks of keys.
typedef struct {
    unit *q, *grad;              // [BLOCK][units], then as pairs along the tokens
    unit *q_across, *grad_across;  // [units][BLOCK]
    float *s, *d, *dq;           // [BLOCK][BLOCK] twice, [BLOCK][deep]
    unit *p, *ds, *dsn;          // pairs: [BLOCK][BLOCK / 2] twice, [BLOCK / 2][BLOCK]
    float lse[BLOCK], delta[BLOCK];
} Queries;

INLINE void backward_keys(int pairs, const Task *t, const Block *b, Queries *x, int64_t n0,
                          int64_t n1) {
    const int64_t each = 1 + pairs;
    scores(pairs, t, b, t->keys, x->q_across, n0, n1, x->s);
    scores(pairs, t, b, t->values, x->grad_across, n0, n1, x->d);
    for (int64_t n = n0; n < n1; n += 2)
        backward_pair(pairs, t->call, b, n, n - n0, x->lse, x->delta, x->s, x->d, x->p, x->ds,
                      x->dsn);
    const unit *p = pairs ? x->p : (unit *)x->s, *ds = pairs ? x->ds : (unit *)x->d;
    const unit *dsn = pairs ? x->dsn : (unit *)x->d, *keys = pairs ? t->pairs : t->keys;
    const int64_t stride = BLOCK / each;
    for (int64_t n = n0; n < n1; n += 4) {
        const int64_t c0 = columns_from(b, n), c1 = columns_to(b, n), k = (c1 - c0) / each;
        if (c0 >= c1) continue;
        const int64_t at = (n - n0) * stride + c0 / each, from = c0 / each * t->deep;
        product(pairs, p + at, stride, 1, x->grad + from, t->deep, t->dv + n * t->deep, t->deep, k,
                t->deep, 1);
        product(pairs, ds + at, stride, 1, x->q + from, t->deep, t->dk + n * t->deep, t->deep, k,
                t->deep, 1);
    }
    for (int64_t m = 0; m < b->columns; m += 4) {
        const int64_t from = keys_from(b, m) > n0 ? keys_from(b, m) : n0;
        const int64_t to = keys_to(b, m) < n1 ? keys_to(b, m) : n1;
        if (from < to)
            product(pairs, dsn + (from - n0) / each * BLOCK + m, 1, BLOCK,
                    keys + from / each * t->deep, t->deep, x->dq + m * t->deep, t->deep,
                    (to - from) / each, t->deep, 1);
    }
}

INLINE void backward_block(int pairs, const Task *t, int64_t head, int64_t first, Queries *x) {
    const Call *call = t->call;
    const int64_t count = t->count - first < BLOCK ? t->count - first : BLOCK;
    const Block b = {first, up(count, STEP), call->window};
    const int64_t stride = call->heads * call->width;
    const Tokens q = turning(t, call->q, call->q_token, head, call->q_head, first, count);
    const Tokens out = tokens(t, call->out, stride, head, call->width, first, count);
    const Tokens grad =
        tokens(t, call->grad, call->grad_token, head, call->grad_head, first, count);
    by_rows(pairs, &q, b.columns, t->units, x->q);
    by_rows(pairs, &grad, b.columns, t->units, x->grad);
    transposed(x->q, b.columns, t->units, x->q_across);
    transposed(x->grad, b.columns, t->units, x->grad_across);
    if (pairs) by_pairs(b.columns, t->units, x->q), by_pairs(b.columns, t->units, x->grad);
    const float *lse = call->lse + head * call->tokens + t->first + first;
    for (int64_t m = 0; m < b.columns; m++) {
        x->lse[m] = m < count ? lse[m] : 1e30f;  // so that a query of the padding weighs nothing
        x->delta[m] = m < count ? dot(&grad, &out, m) : 0.0f;
    }
    memset(x->dq, 0, b.columns * t->deep * sizeof(float));
    const int64_t last = first + b.columns;
    for (int64_t n0 = keys_from(&b, 0); n0 < last; n0 += BLOCK)
        backward_keys(pairs, t, &b, x, n0, n0 + BLOCK < last ? n0 + BLOCK : last);
    if (q.cos) turn_back(q.cos, q.sin, t->deep, count, call->width, x->dq);
    unpack(x->dq, t->deep, count, call->width, stride, call->bf16, 0, call->scale, call->dq,
           (t->first + first) * stride + head * call->width);
}

INLINE void backward(int pairs, Task *t) {
    const Call *call = t->call;
    const int64_t group = call->heads / call->kv_heads, size = t->padded * t->deep;
    Queries x = {0};
    x.q = (unit *)take(&t->rest, BLOCK * t->units);
    x.grad = (unit *)take(&t->rest, BLOCK * t->units);
    x.q_across = (unit *)take(&t->rest, BLOCK * t->units);
    x.grad_across = (unit *)take(&t->rest, BLOCK * t->units);
    x.dq = take(&t->rest, BLOCK * t->deep);
    x.s = take(&t->rest, BLOCK * BLOCK);
    x.d = take(&t->rest, BLOCK * BLOCK);
    x.p = (unit *)take(&t->rest, BLOCK * BLOCK / 2);
    x.ds = (unit *)take(&t->rest, BLOCK * BLOCK / 2);
    x.dsn = (unit *)take(&t->rest, BLOCK * BLOCK / 2);
    t->dk = take(&t->rest, size);
    t->dv = take(&t->rest, size);
    memset(t->dk, 0, size * sizeof(float));
    memset(t->dv, 0, size * sizeof(float));
    if (pairs) {
        t->pairs = (unit *)take(&t->rest, t->padded * t->units);
        memcpy(t->pairs, t->keys, t->padded * t->units * sizeof(unit));
        by_pairs(t->padded, t->units, t->pairs);
    }
    for (int64_t h = t->head * group; h < (t->head + 1) * group; h++)
        for (int64_t first = 0; first < t->count; first += BLOCK)
            backward_block(pairs, t, h, first, &x);
    const int64_t stride = call->kv_heads * call->width;
    const int64_t offset = t->first * stride + t->head * call->width;
    if (call->cos) {
        const int64_t at = t->first * call->width;
        turn_back(call->cos + at, call->sin + at, t->deep, t->count, call->width, t->dk);
    }
    unpack(t->dk, t->deep, t->count, call->width, stride, call->bf16, 0, call->scale, call->dk,
           offset);
    unpack(t->dv, t->deep, t->count, call->width, stride, call->bf16, 0, 1.0f, call->dv, offset);
}

INLINE void perform(int pairs, const Call *call, int64_t index, float *scratch) {
    const int64_t row = call->order[index / call->kv_heads];
    Task t = {.call = call, .head = index % call->kv_heads, .rest = scratch};
    t.first = call->starts[row];
    t.count = call->starts[row + 1] - t.first;
    t.padded = up(t.count, STEP);
    t.deep = up(call->width, STEP);
    t.units = t.deep / (1 + pairs);
    t.keys = (unit *)take(&t.rest, t.padded * t.units);
    t.values = (unit *)take(&t.rest, t.padded * t.units);
    const Tokens k = turning(&t, call->k, call->k_token, t.head, call->k_head, 0, t.count);
    const Tokens v = tokens(&t, call->v, call->v_token, t.head, call->v_head, 0, t.count);
    by_rows(pairs, &k, t.padded, t.units, t.keys);
    by_rows(pairs, &v, t.padded, t.units, t.values);
    if (call->backward)
        backward(pairs, &t);
    else
        forward(pairs, &t);
}

// --- calls -------------------------------------------------------------------------------------

typedef struct { const Call *call; _Atomic uint64_t *taken; } Work;  // a bit a share of the scratch

static void part(const void *given, int64_t first, int64_t last) {
    const Work *work = given;
    int mine = 0;
    uint64_t taken = atomic_load(work->taken);
    do {
        mine = __builtin_ctzll(~taken);  // there is one free: no more threads than shares are here
    } while (!atomic_compare_exchange_weak(work->taken, &taken, taken | (uint64_t)1 << mine));
    float *scratch = work->call->scratch + mine * work->call->share;
    for (int64_t index = first; index < last; index++) {
        if (work->call->pairs)
            perform(1, work->call, index, scratch);
        else
            perform(0, work->call, index, scratch);
    }
    atomic_fetch_and(work->taken, ~((uint64_t)1 << mine));
}

// 1 where the processor multiplies pairs of bfloat16
int inlay_attention_pairs(void) {
#ifdef PAIRS
    return 1;
#else
    return 0;
#endif
}

// floats of scratch that one thread needs
int64_t inlay_attention_scratch(int64_t longest, int64_t width) {
    const int64_t deep = up(width, STEP), padded = up(longest, STEP) * deep;
    return 5 * (padded + 16) + 5 * BLOCK * deep + 4 * BLOCK * BLOCK + 3 * CHUNK * BLOCK / 2 + 256;
}

void inlay_attention(const Call *call) {
    _Atomic uint64_t taken = 0;
    const Work work = {call, &taken};
    share_out(part, &work, call->rows * call->kv_heads, 1, (int)call->threads);
}

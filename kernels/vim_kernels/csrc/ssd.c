// State-space duality, forward and backward: the recurrence of heads whose states all decay alike,
//
//     delta[t] = softplus(dt[t] + dt_bias)
//     h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * x[t] B[t]^T
//     y[t] = h[t] C[t] + D * x[t]
//
// as matrix products over chunks of STEPS steps. With L[q, k] the decay of step k's input until step q, within a chunk
//
//     y = (C B^T o L) (delta x) + (decay since the start) C h
//     h' = (decay of the chunk) h + (delta x, decayed until the end)^T B
//
// A task is a part of a group's heads in one batch element, which share C B^T. It walks along the sequence in chunks
// and takes each chunk head by head. The backward first walks forward to keep the state before each chunk, and then
// backwards. Shapes: B batch, L length, H heads, G groups, P head_dim, N d_state, Q steps of a chunk.
#include <stdlib.h>

#include "layout.h"
#include "parallel.h"
#include "product.h"

enum { STEPS = 48, GRAIN = 1 << 20 };  // STEPS: a multiple of PAD. GRAIN: in states times steps, for `threads_for`

#ifdef DOUBLE
#define NOTHING 1e-290
#else
#define NOTHING 1e-30f  // smaller decays count as 0: denormal numbers would slow the products down
#endif

// An absent tensor is NULL, and so is its gradient.
typedef struct {
    Team team;
    int64_t threads, batch, length, heads, head_dim, d_state, groups, softplus;
    Sequence x, dt, B, C, y;                      // (B, L, H, P), (B, L, H), (B, L, G, N), (B, L, G, N), like x
    const real *A, *D, *dt_bias, *initial_state;  // (H), (H), (H), (B, H, P, N)
    real *last_state;                             // (B, H, P, N)
    // For the backward:
    Sequence dy, dx, ddt, dB, dC;
    const real *d_last_state;
    real *dA, *dD, *d_bias, *d_initial_state;
} Ssd;

// The division of the heads, and the memory of a call.
typedef struct {
    const Ssd *ssd;
    int threads;
    int64_t part_heads, parts;  // per group, for any number of threads: dB and dC are sums over parts in this order
    int64_t chunks, P, N;       // P, N: padded
    real *scratch;              // (threads, scratch_size)
    int64_t scratch_size;
    real *sums;     // (B, H, 3): dA, dD, d_bias of each batch element
    real *dB, *dC;  // (parts, B, L, G, N); unused if there is one part
} Work;

typedef struct {
    int64_t batch, group, part, begin, end;  // heads [begin, end)
} Task;

static Task task_of(const Work *w, int64_t index) {
    const Ssd *s = w->ssd;
    int64_t heads = s->heads / s->groups, part = index % w->parts, group = index / w->parts % s->groups;
    int64_t begin = part * w->part_heads, end = begin + w->part_heads < heads ? begin + w->part_heads : heads;
    return (Task){index / w->parts / s->groups, group, part, group * heads + begin, group * heads + end};
}

// The scratch space of a thread. Q = STEPS, P and N are padded.
typedef struct {
    Matrix B, C, B_t, scores;         // (Q, N), (Q, N), (N, Q) and C B^T (Q, Q): of the group, in a chunk
    Matrix decays, x, y, own_B, own_C;  // L (Q, Q), (Q, P), (Q, P), (Q, N), (Q, N): of a head, in a chunk
    real *states;                     // (heads of a part, N, P) in the forward, (heads, P, N) in the backward
    // For the backward. There, `states` are gradients, and `y` is the gradient of y:
    Matrix x_t, d_weights, turned, along_B, along_C;  // (P, Q), (Q, Q), (N, P), (Q, N), (Q, N): of a head, in a chunk
    Matrix d_scores, dB, dC;                          // (Q, Q), (Q, N), (Q, N): of the group, in a chunk
    real *before;                                     // (chunks, heads, P, N): the state before each chunk
} Memory;

// The next `size` numbers at `base`, which is NULL if only the size is wanted.
static real *take(real *base, int64_t *used, int64_t size) {
    real *found = base ? base + *used : NULL;
    *used += size;
    return found;
}

static int64_t lay_out(Memory *m, const Work *w, real *base, bool backward) {
    int64_t P = w->P, N = w->N, Q = STEPS, used = 0, states = w->part_heads * P * N;
#define MATRIX(rows, columns) (Matrix){take(base, &used, (rows) * (columns)), columns}
    m->B = MATRIX(Q, N), m->C = MATRIX(Q, N), m->B_t = MATRIX(N, Q), m->scores = MATRIX(Q, Q);
    m->decays = MATRIX(Q, Q), m->x = MATRIX(Q, P), m->y = MATRIX(Q, P);
    m->own_B = MATRIX(Q, N), m->own_C = MATRIX(Q, N);
    m->states = take(base, &used, states);
    if (!backward) return used;
    m->x_t = MATRIX(P, Q), m->d_weights = MATRIX(Q, Q), m->turned = MATRIX(N, P);
    m->along_B = MATRIX(Q, N), m->along_C = MATRIX(Q, N);
    m->d_scores = MATRIX(Q, Q), m->dB = MATRIX(Q, N), m->dC = MATRIX(Q, N);
    m->before = take(base, &used, w->chunks * states);
    return used;
#undef MATRIX
}

static Memory begin_memory(const Work *w, int thread, bool backward) {
    Memory m;
    real *base = w->scratch + thread * w->scratch_size;
    memset(base, 0, lay_out(&m, w, base, backward) * sizeof(real));  // the padding, too
    return m;
}

// to[k] = scale[k] * from[k] for the steps k of a chunk; without a scale, a copy.
static void copy_rows(Matrix to, const real *from, int64_t from_row, const real *scale, int64_t rows, int64_t columns) {
    for (int64_t k = 0; k < rows; k++) {
        real factor = scale ? scale[k] : 1;
        for (int64_t j = 0; j < columns; j++) to.data[k * to.row + j] = factor * from[k * from_row + j];
    }
}

INLINE Left rows_of(Matrix m, Triangle triangle) { return (Left){m.data, m.row, 1, triangle}; }
INLINE Left columns_of(Matrix m, Triangle triangle) { return (Left){m.data, 1, m.row, triangle}; }

// A chunk of a task.
typedef struct {
    const Ssd *ssd;
    Task task;
    int64_t start, steps;
} Chunk;

static Chunk chunk_of(const Work *w, Task t, int64_t number) {
    int64_t start = number * STEPS, left = w->ssd->length - start;
    return (Chunk){w->ssd, t, start, left < STEPS ? left : STEPS};
}

// B, C and C B^T of the group
static void begin_chunk(const Memory *m, Chunk c) {
    const Ssd *s = c.ssd;
    int64_t N = s->d_state;
    copy_rows(m->B, at(s->B, c.task.batch, c.start) + c.task.group * s->B.group, s->B.step, NULL, c.steps, N);
    copy_rows(m->C, at(s->C, c.task.batch, c.start) + c.task.group * s->C.group, s->C.step, NULL, c.steps, N);
    transpose(m->B_t, m->B.data, m->B.row, c.steps, N);
    product(m->scores, LOWER, c.steps, c.steps, rows_of(m->C, ALL), m->B_t, N, 0);
}

// Step sizes and decays of a head in a chunk
typedef struct {
    real delta[STEPS], slope[STEPS], decay[STEPS];  // slope: of softplus
    real since_start[STEPS], to_end[STEPS];       // the decays from before the chunk, and from each step until its end
    real whole;                                   // the decay of the chunk
} Steps;

INLINE real or_nothing(real decay) { return decay < NOTHING ? 0 : decay; }

static void begin_steps(Steps *e, Chunk c, int64_t head) {
    const Ssd *s = c.ssd;
    real bias = s->dt_bias ? s->dt_bias[head] : 0, passed = 1, ahead = 1;
    for (int64_t k = 0; k < STEPS; k++)
        e->delta[k] = k < c.steps ? at(s->dt, c.task.batch, c.start + k)[head] + bias : 0;
    for (int64_t k = 0; k < STEPS; k += LANES) {
        Vec raw = load(e->delta + k, LANES), delta = s->softplus ? softplus(raw) : raw;
        store(e->delta + k, delta, LANES);
        store(e->slope + k, s->softplus ? softplus_slope(raw) : splat(1), LANES);
        store(e->decay + k, exp2_of(delta * (s->A[head] * (real)M_LOG2E)), LANES);
    }
    for (int64_t k = 0; k < c.steps; k++) e->since_start[k] = passed = or_nothing(passed * e->decay[k]);
    for (int64_t k = c.steps - 1; k >= 0; k--) e->to_end[k] = ahead, ahead = or_nothing(ahead * e->decay[k]);
    e->whole = passed;
}

INLINE Mask lane_numbers(void) {
    Mask m;
    for (int i = 0; i < LANES; i++) m[i] = i;
    return m;
}

// L[q, k] for k <= q, and 0 in the rest of the diagonal's vectors. A product of decays keeps its digits; the difference
// of two sums of exponents, which may be large and nearly equal, would not.
static void begin_decays(Matrix decays, const Steps *e, int64_t steps) {
    for (int64_t k = 0; k < steps; k += LANES) {
        Vec decay = splat(0);
        for (int64_t q = k / PAD * PAD; q < steps; q++) {
            Mask past = lane_numbers() < (bits)(q - k), present = lane_numbers() == (bits)(q - k);
            decay *= e->decay[q];
            decay = choose(past & ~(decay < NOTHING), decay, splat(0));
            decay = choose(present, splat(1), decay);
            store(decays.data + q * decays.row + k, decay, LANES);
        }
    }
}

static void forward_head(const Memory *m, Chunk c, int64_t head, Matrix state) {
    const Ssd *s = c.ssd;
    int64_t P = s->head_dim, N = s->d_state;
    Steps e;
    begin_steps(&e, c, head);
    begin_decays(m->decays, &e, c.steps);
    for (int64_t q = 0; q < c.steps; q++)
        for (int64_t k = 0; k < padded(q + 1); k++)
            m->decays.data[q * STEPS + k] *= m->scores.data[q * STEPS + k];
    const real *x = at(s->x, c.task.batch, c.start) + head * s->x.group;
    copy_rows(m->x, x, s->x.step, e.delta, c.steps, P);
    copy_rows(m->own_B, m->B.data, m->B.row, e.to_end, c.steps, N);
    copy_rows(m->own_C, m->C.data, m->C.row, e.since_start, c.steps, N);

    product(m->y, ALL, c.steps, P, rows_of(m->own_C, ALL), state, N, 0);
    product(m->y, ALL, c.steps, P, rows_of(m->decays, LOWER), m->x, c.steps, 1);
    product(state, ALL, N, P, columns_of(m->own_B, ALL), m->x, c.steps, e.whole);

    real D = s->D ? s->D[head] : 0;
    for (int64_t k = 0; k < c.steps; k++) {
        real *y = at(s->y, c.task.batch, c.start + k) + head * s->y.group;
        for (int64_t j = 0; j < P; j++) y[j] = m->y.data[k * m->y.row + j] + D * x[k * s->x.step + j];
    }
}

static void forward_task(const void *work, int64_t index, int thread) {
    const Work *w = work;
    const Ssd *s = w->ssd;
    Task t = task_of(w, index);
    Memory m = begin_memory(w, thread, false);
    int64_t P = s->head_dim, N = s->d_state;
    for (int64_t head = t.begin; head < t.end && s->initial_state; head++)
        transpose((Matrix){m.states + (head - t.begin) * w->N * w->P, w->P},
                  s->initial_state + (t.batch * s->heads + head) * P * N, N, P, N);
    for (int64_t number = 0; number < w->chunks; number++) {
        Chunk c = chunk_of(w, t, number);
        begin_chunk(&m, c);
        for (int64_t head = t.begin; head < t.end; head++)
            forward_head(&m, c, head, (Matrix){m.states + (head - t.begin) * w->N * w->P, w->P});
    }
    for (int64_t head = t.begin; head < t.end; head++)
        transpose((Matrix){s->last_state + (t.batch * s->heads + head) * P * N, N},
                  m.states + (head - t.begin) * w->N * w->P, w->P, N, P);
}

// The state after a chunk, (P, N), from the one before it
static void advance_state(const Memory *m, Chunk c, int64_t head, const real *before, Matrix after, int64_t size) {
    const Ssd *s = c.ssd;
    Steps e;
    begin_steps(&e, c, head);
    for (int64_t k = 0; k < c.steps; k++) e.to_end[k] *= e.delta[k];
    const real *x = at(s->x, c.task.batch, c.start) + head * s->x.group;
    copy_rows(m->x, x, s->x.step, e.to_end, c.steps, s->head_dim);
    memcpy(after.data, before, size * sizeof(real));
    product(after, ALL, s->head_dim, s->d_state, columns_of(m->x, ALL), m->B, c.steps, e.whole);
}

// Through the products within a chunk. On return `decays` holds the weights (C B^T o L), d_exponent[j] the sum of
// d_weights o weights o delta over q >= j > k, and along_x[k] that of d_weights o weights over q.
static void backward_weights(const Memory *m, const Steps *e, int64_t steps, real *d_exponent, real *along_x) {
    Vec below[STEPS / LANES];  // for each k, the sum over the rows so far
    for (int i = 0; i < STEPS / LANES; i++) below[i] = splat(0);
    for (int64_t q = steps - 1; q >= 0; q--) {
        Vec sum = splat(0);
        for (int64_t k = 0; k < padded(q + 1); k += LANES) {
            int64_t place = q * STEPS + k;
            Vec decay = load(m->decays.data + place, LANES), delta = load(e->delta + k, LANES);
            Vec weight = decay * load(m->scores.data + place, LANES), d_weight = load(m->d_weights.data + place, LANES);
            Vec d_score = load(m->d_scores.data + place, LANES) + d_weight * decay * delta;
            below[k / LANES] += d_weight * weight;
            // Only terms that a decay is part of: where it forgets all, its gradient is exactly 0.
            sum += choose(lane_numbers() < (bits)(q - k), delta * below[k / LANES], splat(0));
            store(m->d_scores.data + place, d_score, LANES);
            store(m->decays.data + place, weight, LANES);
        }
        d_exponent[q] = sum_lanes(sum);
    }
    for (int i = 0; i < STEPS / LANES; i++) store(along_x + i * LANES, below[i], LANES);
}

// dots[k] = <a[k], b[k]> and to[k] += factor[k] * b[k]
static void dot_and_add(real *dots, Matrix to, Matrix a, Matrix b, const real *factor, int64_t rows, int64_t columns) {
    for (int64_t k = 0; k < rows; k++) {
        Vec sum = splat(0);
        for (int64_t j = 0; j < columns; j += LANES) {
            real *sum_to = to.data + k * to.row + j;
            Vec v = load(b.data + k * b.row + j, LANES);
            sum += v * load(a.data + k * a.row + j, LANES);
            store(sum_to, load(sum_to, LANES) + v * factor[k], LANES);
        }
        dots[k] = sum_lanes(sum);
    }
}

static void backward_head(const Work *w, const Memory *m, Chunk c, int64_t head, Matrix d_state, Matrix before) {
    const Ssd *s = c.ssd;
    Task t = c.task;
    int64_t P = s->head_dim, N = s->d_state;
    Steps e;
    begin_steps(&e, c, head);
    begin_decays(m->decays, &e, c.steps);
    const real *x = at(s->x, t.batch, c.start) + head * s->x.group;
    const real *dy = at(s->dy, t.batch, c.start) + head * s->dy.group;
    copy_rows(m->x, x, s->x.step, NULL, c.steps, P);
    copy_rows(m->y, dy, s->dy.step, NULL, c.steps, P);
    transpose(m->x_t, x, s->x.step, c.steps, P);
    transpose(m->turned, d_state.data, d_state.row, P, N);

    product(m->d_weights, LOWER, c.steps, c.steps, rows_of(m->y, ALL), m->x_t, P, 0);
    real d_exponent[STEPS], along_x[STEPS], dot_B[STEPS], dot_C[STEPS], factor[STEPS], dD = 0;
    for (int64_t k = 0; k < c.steps; k++) dD += m->d_weights.data[k * STEPS + k];
    backward_weights(m, &e, c.steps, d_exponent, along_x);

    copy_rows(m->own_B, m->B.data, m->B.row, e.to_end, c.steps, N);
    Matrix dx = {m->x_t.data, w->P};  // in memory that is free now; without delta and D
    product(dx, ALL, c.steps, P, rows_of(m->own_B, ALL), m->turned, N, 0);
    product(dx, ALL, c.steps, P, columns_of(m->decays, UPPER), m->y, c.steps, 1);

    // Across chunks: y reads the state before the chunk, and the state after it has the rest of x.
    product(m->along_C, ALL, c.steps, N, rows_of(m->y, ALL), before, P, 0);
    product(m->along_B, ALL, c.steps, N, rows_of(m->x, ALL), d_state, P, 0);
    dot_and_add(dot_C, m->dC, m->C, m->along_C, e.since_start, c.steps, w->N);
    for (int64_t k = 0; k < c.steps; k++) factor[k] = e.delta[k] * e.to_end[k];
    dot_and_add(dot_B, m->dB, m->B, m->along_B, factor, c.steps, w->N);
    Vec both = splat(0);
    for (int64_t i = 0; i < P * w->N; i += LANES) both += load(before.data + i, LANES) * load(d_state.data + i, LANES);
    real later = e.whole * sum_lanes(both), earlier = 0;
    for (int64_t k = c.steps - 1; k >= 0; k--) d_exponent[k] += later += e.since_start[k] * dot_C[k];
    for (int64_t k = 0; k < c.steps; k++) d_exponent[k] += earlier, earlier += factor[k] * dot_B[k];

    copy_rows(m->own_C, m->C.data, m->C.row, e.since_start, c.steps, N);
    product(d_state, ALL, P, N, columns_of(m->y, ALL), m->own_C, c.steps, e.whole);

    real *sums = w->sums + (t.batch * s->heads + head) * 3, A = s->A[head], D = s->D ? s->D[head] : 0;
    for (int64_t k = 0; k < c.steps; k++) {
        real d_delta = along_x[k] + e.to_end[k] * dot_B[k] + d_exponent[k] * A;
        d_delta *= e.slope[k];
        at(s->ddt, t.batch, c.start + k)[head] = d_delta;
        sums[0] += d_exponent[k] * e.delta[k];
        sums[2] += d_delta;
        real *to = at(s->dx, t.batch, c.start + k) + head * s->dx.group;
        for (int64_t j = 0; j < P; j++) to[j] = e.delta[k] * dx.data[k * dx.row + j] + D * dy[k * s->dy.step + j];
    }
    sums[1] += dD;
}

// Write a part's share of dB or dC for one chunk.
static void write_share(const Work *w, Chunk c, Matrix share, Sequence whole, real *shares) {
    const Ssd *s = w->ssd;
    int64_t size = s->batch * s->length * s->groups * s->d_state;
    if (w->parts > 1) whole.data = shares + c.task.part * size + (whole.step < 0 ? (1 - s->length) * whole.step : 0);
    real *to = at(whole, c.task.batch, c.start) + c.task.group * whole.group;
    for (int64_t k = 0; k < c.steps; k++)
        memcpy(to + k * whole.step, share.data + k * share.row, s->d_state * sizeof(real));
}

static void backward_task(const void *work, int64_t index, int thread) {
    const Work *w = work;
    const Ssd *s = w->ssd;
    Task t = task_of(w, index);
    Memory m = begin_memory(w, thread, true);
    int64_t P = s->head_dim, N = s->d_state, size = w->P * w->N, heads = t.end - t.begin;
    memset(w->sums + (t.batch * s->heads + t.begin) * 3, 0, heads * 3 * sizeof(real));
    for (int64_t i = 0; i < heads; i++) {
        int64_t first = (t.batch * s->heads + t.begin + i) * P * N;
        Matrix before = {m.before + i * size, w->N}, d_state = {m.states + i * size, w->N};
        if (s->initial_state) copy_rows(before, s->initial_state + first, N, NULL, P, N);
        if (s->d_last_state) copy_rows(d_state, s->d_last_state + first, N, NULL, P, N);
    }
    for (int64_t number = 0; number < w->chunks - 1; number++) {
        Chunk c = chunk_of(w, t, number);
        copy_rows(m.B, at(s->B, t.batch, c.start) + t.group * s->B.group, s->B.step, NULL, c.steps, N);
        for (int64_t i = 0; i < heads; i++) {
            real *before = m.before + (number * w->part_heads + i) * size;
            advance_state(&m, c, t.begin + i, before, (Matrix){before + w->part_heads * size, w->N}, size);
        }
    }
    for (int64_t number = w->chunks - 1; number >= 0; number--) {
        Chunk c = chunk_of(w, t, number);
        begin_chunk(&m, c);
        memset(m.d_scores.data, 0, STEPS * STEPS * sizeof(real));
        memset(m.dB.data, 0, STEPS * w->N * sizeof(real));
        memset(m.dC.data, 0, STEPS * w->N * sizeof(real));
        for (int64_t i = 0; i < heads; i++)
            backward_head(w, &m, c, t.begin + i, (Matrix){m.states + i * size, w->N},
                          (Matrix){m.before + (number * w->part_heads + i) * size, w->N});
        product(m.dC, ALL, c.steps, N, rows_of(m.d_scores, LOWER), m.B, c.steps, 1);
        product(m.dB, ALL, c.steps, N, columns_of(m.d_scores, UPPER), m.C, c.steps, 1);
        write_share(w, c, m.dB, s->dB, w->dB);
        write_share(w, c, m.dC, s->dC, w->dC);
    }
    for (int64_t i = 0; i < heads && s->d_initial_state; i++)
        copy_rows((Matrix){s->d_initial_state + (t.batch * s->heads + t.begin + i) * P * N, N}, m.states + i * size,
                  w->N, NULL, P, N);
}

// dB and dC of one batch element
static void sum_shares(const void *work, int64_t batch, int thread) {
    (void)thread;
    const Work *w = work;
    const Ssd *s = w->ssd;
    int64_t size = s->length * s->groups * s->d_state;
    int64_t first = batch * size + (s->dB.step < 0 ? (s->length - 1) * s->dB.step : 0);
    sum_rows(s->dB.data + first, w->dB + batch * size, w->parts, s->batch * size, size);
    sum_rows(s->dC.data + first, w->dC + batch * size, w->parts, s->batch * size, size);
}

static void sum_batch(const Work *w) {
    const Ssd *s = w->ssd;
    real *sums = w->sums, *to[3] = {s->dA, s->dD, s->d_bias};
    sum_rows(sums, sums, s->batch, s->heads * 3, s->heads * 3);
    for (int i = 0; i < 3; i++)
        for (int64_t head = 0; head < s->heads && to[i]; head++) to[i][head] = sums[head * 3 + i];
}

// Divide the heads and allocate. Returns false if there is no memory.
static bool begin_work(Work *w, const Ssd *s, bool backward) {
    int64_t heads = s->heads / s->groups, rows = s->batch * s->groups, part_heads = heads;
    // Heads of a part share C B^T, but there must be enough parts for many threads.
    while (part_heads > 1 && rows * ceil_div(heads, part_heads) < 16) part_heads = (part_heads + 1) / 2;
    *w = (Work){
        .ssd = s,
        .threads = threads_for(s->threads, s->batch * s->length * s->heads * s->head_dim * s->d_state, GRAIN),
        .part_heads = part_heads,
        .parts = ceil_div(heads, part_heads),
        .chunks = ceil_div(s->length, STEPS),
        .P = padded(s->head_dim),
        .N = padded(s->d_state),
    };
    Memory m;
    w->scratch_size = lay_out(&m, w, NULL, backward);
    int64_t sums = backward ? s->batch * s->heads * 3 : 0;
    int64_t shares = backward && w->parts > 1 ? w->parts * rows * s->length * s->d_state : 0;
    int64_t reals = w->threads * w->scratch_size + sums + 2 * shares;
    w->scratch = aligned_alloc(sizeof(Vec), ceil_div(reals, LANES) * sizeof(Vec));
    if (!w->scratch) return false;
    w->sums = w->scratch + w->threads * w->scratch_size;
    w->dB = w->sums + sums;
    w->dC = w->dB + shares;
    return true;
}

// Both return 0, or -1 if there is no memory.

int ssd_forward(const Ssd *s) {
    Work w;
    if (!begin_work(&w, s, false)) return -1;
    parallel(s->team, w.threads, s->batch * s->groups * w.parts, forward_task, &w);
    free(w.scratch);
    return 0;
}

int ssd_backward(const Ssd *s) {
    Work w;
    if (!begin_work(&w, s, true)) return -1;
    parallel(s->team, w.threads, s->batch * s->groups * w.parts, backward_task, &w);
    if (w.parts > 1) parallel(s->team, w.threads, s->batch, sum_shares, &w);
    sum_batch(&w);
    free(w.scratch);
    return 0;
}

// The selective scan, forward and backward, of one or two directions over a sequence:
//
//     delta[t] = softplus(dt[t] + dt_bias)
//     h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * u[t] * B[t]
//     y[t] = <C[t], h[t]> + D * u[t],    out = scale * sum over directions(y) * silu(z)
//
// Channels interact only in the sums for dB and dC. So a vector holds a tile of neighbouring channels, its states stay
// in registers, and a plain loop runs over the steps. A task is a range of channels of one batch element. It walks
// along the sequence in chunks of CHUNK steps and takes each chunk tile by tile.
#include <stdlib.h>

#include "scan.h"

#if VECTOR_BYTES == 64 || defined(__aarch64__)
enum { STATES = 16 };  // states of a tile in registers at a time: 16 of 32 registers
#else
enum { STATES = 8 };  // 8 of 16
#endif

enum { GRAIN = 1 << 18 };  // in states times steps, for `threads_for`

// The division of a group's channels, and the memory of a call.
typedef struct {
    const Scan *scan;
    int threads;
    int64_t task_channels, tasks;  // tasks: per group
    int64_t part_channels, parts;  // dB and dC are sums over parts in a fixed order, for any number of parts per task
    real *state;                   // (B, E * N tiled) the state between two chunks; in the backward its gradient
    struct {
        real *A;        // (E * N tiled) log2(e) * A
        real *sums;     // (B, E * (N + 2) tiled) dA, dD, d_bias of each batch element
        real *dB, *dC;  // (parts, B, L, G, N); unused if a task has all parts
    } of[MAX_DIRECTIONS];
    Vec *dB_dC;  // (threads, 2, CHUNK, N) sums over the tiles of a part
} Work;

typedef struct {
    int64_t batch, group, begin, end;  // channels [begin, end)
} Task;

static Task task_of(const Work *w, int64_t index) {
    const Scan *s = w->scan;
    int64_t channels = s->d_inner / s->groups, group = index / w->tasks % s->groups;
    int64_t begin = index % w->tasks * w->task_channels, end = begin + w->task_channels;
    if (end > channels) end = channels;
    return (Task){index / w->tasks / s->groups, group, group * channels + begin, group * channels + end};
}

// Number of used lanes of the tile that begins at `channel`.
INLINE int lanes_at(const Scan *s, int64_t channel) {
    int64_t channels = s->d_inner / s->groups, left = channels - channel % channels;
    return left < LANES ? (int)left : LANES;
}

// `states` (B, E, N) -> `tiled` (B, E * N tiled) for the channels of a task; zeros if `states` is NULL.
static void begin_states(const Scan *s, Task t, real *tiled, const real *states) {
    int64_t row = t.batch * s->d_inner, N = s->d_state;
    if (!states) {
        memset(tiled + (row + t.begin) * N, 0, (t.end - t.begin) * N * sizeof(real));
        return;
    }
    for (int64_t e = t.begin; e < t.end; e += LANES)
        to_tile(tiled + (row + e) * N, states + (row + e) * N, N, lanes_at(s, e));
}

static void end_states(const Scan *s, Task t, real *states, const real *tiled) {
    int64_t row = t.batch * s->d_inner, N = s->d_state;
    for (int64_t e = t.begin; e < t.end; e += LANES)
        from_tile(states + (row + e) * N, tiled + (row + e) * N, N, lanes_at(s, e));
}

// One tile of one chunk.
typedef struct {
    int64_t batch, start, channel;  // start: the first of its steps
    int steps, lanes;
    const real *A;                  // (N, lanes)
    Sequence B, C;                  // (steps, N)
    real *state;                    // (N, lanes)
    real *checkpoint;               // (N, lanes), NULL if none are saved
    Vec u[CHUNK], raw[CHUNK], delta[CHUNK], x[CHUNK];  // raw: the step size before softplus. x = delta * u
    bool begins[CHUNK];                                // set if sequences are packed; see `starts`
} Tile;

// raw (steps, lanes) = dt (steps, R) dt_proj
static void project_dt(Tile *c, const Scan *s, const Direction *d) {
    Matrix weight = {(real *)d->dt_proj + c->channel, padded(s->d_inner)};
    int k = 0;
    for (; k + ROWS <= c->steps; k += ROWS) {
        Left dt = {at(d->dt, c->batch, c->start + k), d->dt.step, 1, ALL};
        block_product((Matrix){(real *)(c->raw + k), LANES}, 1, dt, weight, 0, s->dt_rank, 0);
    }
    for (; k < c->steps; k++) {
        const real *dt = at(d->dt, c->batch, c->start + k);
        c->raw[k] = splat(0);
        for (int64_t r = 0; r < s->dt_rank; r++) c->raw[k] += dt[r] * load(weight.data + r * weight.row, c->lanes);
    }
}

static void begin_tile(Tile *c, const Work *w, int direction, Task t, int64_t start, int64_t channel) {
    const Scan *s = w->scan;
    const Direction *d = &s->direction[direction];
    int64_t E = s->d_inner, N = s->d_state, chunks = ceil_div(s->length, CHUNK);
    c->batch = t.batch, c->start = start, c->channel = channel;
    c->steps = s->length - start < CHUNK ? (int)(s->length - start) : CHUNK;
    c->lanes = lanes_at(s, channel);
    c->A = w->of[direction].A + channel * N;
    c->B = d->B, c->B.data = at(d->B, t.batch, start) + t.group * d->B.group;
    c->C = d->C, c->C.data = at(d->C, t.batch, start) + t.group * d->C.group;
    c->state = w->state + (t.batch * E + channel) * N;
    c->checkpoint = d->checkpoints;
    if (d->checkpoints) c->checkpoint += ((t.batch * chunks + start / CHUNK) * E + channel) * N;

    Vec bias = d->dt_bias ? load(d->dt_bias + channel, c->lanes) : splat(0);
    if (d->dt_proj) project_dt(c, s, d);
    for (int k = 0; k < c->steps; k++) {
        c->u[k] = stream(at(d->u, t.batch, start + k) + channel, c->lanes);
        if (!d->dt_proj) c->raw[k] = stream(at(d->dt, t.batch, start + k) + channel, c->lanes);
        c->raw[k] += bias;
        c->delta[k] = s->softplus ? softplus(c->raw[k]) : c->raw[k];
        c->x[k] = c->delta[k] * c->u[k];
    }
    if (d->starts.data)
        for (int k = 0; k < c->steps; k++) c->begins[k] = flag_at(d->starts, t.batch, start + k);
}

// Advance states [first, first + states) of the tile through the chunk and add <C, h> to y. `packed` is a compile-time
// constant, so rows of one sequence have no overhead.
INLINE void forward_states(const Tile *c, int64_t first, int states, bool packed, Vec *y) {
    Vec A[STATES], h[STATES];
    UNROLL for (int n = 0; n < states; n++) {
        A[n] = load(c->A + (first + n) * c->lanes, c->lanes);
        h[n] = load(c->state + (first + n) * c->lanes, c->lanes);
    }
    for (int k = 0; k < c->steps; k++) {
        const real *B = at(c->B, 0, k) + first, *C = at(c->C, 0, k) + first;
        Vec delta = c->delta[k], x = c->x[k], sum = y[k];
        if (packed && c->begins[k]) {
            UNROLL for (int n = 0; n < states; n++) h[n] = splat(0);
        }
        UNROLL for (int n = 0; n < states; n++) {
            h[n] = exp2_of(delta * A[n]) * h[n] + x * B[n];
            sum += C[n] * h[n];
        }
        y[k] = sum;
    }
    UNROLL for (int n = 0; n < states; n++) store(c->state + (first + n) * c->lanes, h[n], c->lanes);
}

INLINE void forward_all_states(const Tile *c, int64_t N, bool packed, Vec *y) {
    int64_t n = 0;
    for (; n + STATES <= N; n += STATES) forward_states(c, n, STATES, packed, y);
    if (n < N) forward_states(c, n, (int)(N - n), packed, y);
}

static void forward_tile(const Work *w, int direction, Task t, int64_t start, int64_t channel) {
    const Scan *s = w->scan;
    const Direction *d = &s->direction[direction];
    Tile c;
    begin_tile(&c, w, direction, t, start, channel);
    if (c.checkpoint) memcpy(c.checkpoint, c.state, s->d_state * c.lanes * sizeof(real));

    Vec y[CHUNK], D = d->D ? load(d->D + channel, c.lanes) : splat(0);
    for (int k = 0; k < c.steps; k++) {
        y[k] = D * c.u[k];
        if (direction > 0) y[k] += stream(at(d->y, t.batch, start + k) + channel, c.lanes);
    }
    if (d->starts.data)
        forward_all_states(&c, s->d_state, true, y);
    else
        forward_all_states(&c, s->d_state, false, y);

    bool last = direction == s->directions - 1;
    for (int k = 0; k < c.steps; k++) {
        if (last && d->y_sum.data) store(at(d->y_sum, t.batch, start + k) + channel, y[k], c.lanes);
        if (last) y[k] *= (real)s->scale;
        if (last && d->z.data) {
            Vec z = stream(at(d->z, t.batch, start + k) + channel, c.lanes);
            y[k] *= z * sigmoid(z);
        }
        store(at(d->y, t.batch, start + k) + channel, y[k], c.lanes);
    }
}

static void forward_task(const void *work, int64_t index, int thread) {
    (void)thread;
    const Work *w = work;
    const Scan *s = w->scan;
    Task t = task_of(w, index);
    for (int i = 0; i < s->directions; i++) {
        begin_states(s, t, w->state, s->direction[i].initial_state);
        for (int64_t start = 0; start < s->length; start += CHUNK)
            for (int64_t e = t.begin; e < t.end; e += LANES) forward_tile(w, i, t, start, e);
        if (s->direction[i].last_state) end_states(s, t, s->direction[i].last_state, w->state);
    }
}

// The contributions of a tile's states to the gradients of each step of the chunk.
typedef struct {
    Vec *dB, *dC;         // (CHUNK, N) gradients of B and C, not yet summed over lanes
    Vec along_A[CHUNK];  // sum over n of g decay h[t-1] log2(e) A
    Vec along_B[CHUNK];  // sum over n of g B
} Sums;

// Recompute states [first, first + states) of the chunk, then run the adjoint backwards:
// g[t] = dy[t] C[t] + decay[t+1] g[t+1]. `c->state` holds decay g of the following step.
INLINE void backward_states(const Tile *c, int64_t N, int64_t first, int states, bool packed, const Vec *dy, real *dA,
                            Sums *sums) {
    Vec A[STATES], h[STATES], decay[CHUNK][STATES], decayed[CHUNK][STATES];  // decayed = decay[t] h[t-1]
    UNROLL for (int n = 0; n < states; n++) {
        A[n] = load(c->A + (first + n) * c->lanes, c->lanes);
        h[n] = load(c->checkpoint + (first + n) * c->lanes, c->lanes);
    }
    for (int k = 0; k < c->steps; k++) {
        const real *B = at(c->B, 0, k) + first;
        Vec delta = c->delta[k], x = c->x[k], *dC = sums->dC + k * N + first;
        if (packed && c->begins[k]) {
            UNROLL for (int n = 0; n < states; n++) h[n] = splat(0);
        }
        UNROLL for (int n = 0; n < states; n++) {
            decay[k][n] = exp2_of(delta * A[n]);
            decayed[k][n] = decay[k][n] * h[n];
            h[n] = decayed[k][n] + x * B[n];
            dC[n] += dy[k] * h[n];
        }
    }
    Vec g[STATES], sum_A[STATES];
    UNROLL for (int n = 0; n < states; n++) {
        g[n] = load(c->state + (first + n) * c->lanes, c->lanes);
        sum_A[n] = load(dA + (first + n) * c->lanes, c->lanes);
    }
    for (int k = c->steps - 1; k >= 0; k--) {
        const real *B = at(c->B, 0, k) + first, *C = at(c->C, 0, k) + first;
        Vec delta = c->delta[k], x = c->x[k], *dB = sums->dB + k * N + first;
        Vec along_A = sums->along_A[k], along_B = sums->along_B[k];
        UNROLL for (int n = 0; n < states; n++) {
            Vec g_n = g[n] + dy[k] * C[n], g_exponent = g_n * decayed[k][n];
            dB[n] += g_n * x;
            along_A += g_exponent * A[n];
            along_B += g_n * B[n];
            sum_A[n] += g_exponent * delta;
            g[n] = g_n * decay[k][n];
        }
        if (packed && c->begins[k]) {
            UNROLL for (int n = 0; n < states; n++) g[n] = splat(0);
        }
        sums->along_A[k] = along_A, sums->along_B[k] = along_B;
    }
    UNROLL for (int n = 0; n < states; n++) {
        store(c->state + (first + n) * c->lanes, g[n], c->lanes);
        store(dA + (first + n) * c->lanes, sum_A[n], c->lanes);
    }
}

INLINE void backward_all_states(const Tile *c, int64_t N, bool packed, const Vec *dy, real *dA, Sums *sums) {
    int64_t n = 0;
    for (; n + STATES <= N; n += STATES) backward_states(c, N, n, STATES, packed, dy, dA, sums);
    if (n < N) backward_states(c, N, n, (int)(N - n), packed, dy, dA, sums);
}

static void backward_tile(const Work *w, int direction, Task t, int64_t start, int64_t channel, Sums *sums) {
    const Scan *s = w->scan;
    const Direction *d = &s->direction[direction];
    int64_t N = s->d_state;
    Tile c;
    begin_tile(&c, w, direction, t, start, channel);
    Vec dy[CHUNK];
    for (int k = 0; k < c.steps; k++) {
        sums->along_A[k] = sums->along_B[k] = splat(0);
        dy[k] = stream(at(d->dy, t.batch, start + k) + channel, c.lanes) * (real)s->scale;
        if (!d->z.data) continue;
        Vec z = stream(at(d->z, t.batch, start + k) + channel, c.lanes), gate = sigmoid(z), silu = z * gate;
        if (direction == 0) {
            Vec y_sum = stream(at(d->y_sum, t.batch, start + k) + channel, c.lanes);
            store(at(d->dz, t.batch, start + k) + channel, dy[k] * y_sum * (gate + silu * (1 - gate)), c.lanes);
        }
        dy[k] *= silu;
    }
    real *dA = w->of[direction].sums + (t.batch * s->d_inner + channel) * (N + 2);
    real *dD = dA + N * c.lanes, *d_bias = dD + c.lanes;
    if (d->starts.data)
        backward_all_states(&c, N, true, dy, dA, sums);
    else
        backward_all_states(&c, N, false, dy, dA, sums);

    Vec D = d->D ? load(d->D + channel, c.lanes) : splat(0);
    Vec sum_D = load(dD, c.lanes), sum_bias = load(d_bias, c.lanes);
    for (int k = 0; k < c.steps; k++) {
        Vec du = c.delta[k] * sums->along_B[k] + D * dy[k];
        Vec ddt = sums->along_A[k] * (real)M_LN2 + c.u[k] * sums->along_B[k];
        if (s->softplus) ddt *= softplus_slope(c.raw[k]);
        store(at(d->du, t.batch, start + k) + channel, du, c.lanes);
        store(at(d->ddt, t.batch, start + k) + channel, ddt, c.lanes);
        sum_D += dy[k] * c.u[k];
        sum_bias += ddt;
    }
    store(dD, sum_D, c.lanes);
    store(d_bias, sum_bias, c.lanes);
}

// Write the share of a part of the channels in a gradient of B or C, for one chunk. Parts are summed in order, on any
// number of threads: a task with all parts adds to `whole`; other tasks write to `shares`, for `sum_shares` to add.
static void write_share(const Work *w, Task t, int64_t start, int64_t part, const Vec *sums, Sequence whole,
                        real *shares) {
    const Scan *s = w->scan;
    int64_t N = s->d_state, size = s->batch * s->length * s->groups * N;
    if (w->tasks > 1) whole.data = shares + part * size + (whole.step < 0 ? (1 - s->length) * whole.step : 0);
    for (int k = 0; k < CHUNK && start + k < s->length; k++) {
        real *to = at(whole, t.batch, start + k) + t.group * whole.group;
        for (int64_t n = 0; n < N; n++) {
            real sum = sum_lanes(sums[k * N + n]);
            to[n] = w->tasks == 1 && part > 0 ? to[n] + sum : sum;
        }
    }
}

static void backward_task(const void *work, int64_t index, int thread) {
    const Work *w = work;
    const Scan *s = w->scan;
    Task t = task_of(w, index);
    int64_t N = s->d_state, group_begin = t.group * (s->d_inner / s->groups);
    Sums sums = {.dB = w->dB_dC + thread * 2 * CHUNK * N, .dC = w->dB_dC + (thread * 2 + 1) * CHUNK * N};
    for (int i = 0; i < s->directions; i++) {
        const Direction *d = &s->direction[i];
        begin_states(s, t, w->state, d->d_last_state);
        real *task_sums = w->of[i].sums + (t.batch * s->d_inner + t.begin) * (N + 2);
        memset(task_sums, 0, (t.end - t.begin) * (N + 2) * sizeof(real));
        for (int64_t start = (s->length - 1) / CHUNK * CHUNK; start >= 0; start -= CHUNK)
            for (int64_t begin = t.begin; begin < t.end; begin += w->part_channels) {
                int64_t end = begin + w->part_channels < t.end ? begin + w->part_channels : t.end;
                memset(sums.dB, 0, 2 * CHUNK * N * sizeof(Vec));
                for (int64_t e = begin; e < end; e += LANES) backward_tile(w, i, t, start, e, &sums);
                int64_t part = (begin - group_begin) / w->part_channels;
                write_share(w, t, start, part, sums.dB, d->dB, w->of[i].dB);
                write_share(w, t, start, part, sums.dC, d->dC, w->of[i].dC);
            }
        if (d->d_initial_state) end_states(s, t, d->d_initial_state, w->state);
    }
}

// dB and dC of one batch element
static void sum_shares(const void *work, int64_t batch, int thread) {
    (void)thread;
    const Work *w = work;
    const Scan *s = w->scan;
    int64_t size = s->length * s->groups * s->d_state;
    for (int i = 0; i < s->directions; i++) {
        const Direction *d = &s->direction[i];
        int64_t first = batch * size + (d->dB.step < 0 ? (s->length - 1) * d->dB.step : 0);
        sum_rows(d->dB.data + first, w->of[i].dB + batch * size, w->parts, s->batch * size, size);
        sum_rows(d->dC.data + first, w->of[i].dC + batch * size, w->parts, s->batch * size, size);
    }
}

static void sum_batch(const Work *w) {
    const Scan *s = w->scan;
    int64_t N = s->d_state, group_channels = s->d_inner / s->groups, size = s->d_inner * (N + 2);
    for (int i = 0; i < s->directions; i++) {
        const Direction *d = &s->direction[i];
        real *sums = w->of[i].sums;
        sum_rows(sums, sums, s->batch, size, size);
        for (int64_t g = 0; g < s->groups; g++)
            for (int64_t e = g * group_channels; e < (g + 1) * group_channels; e += LANES) {
                int lanes = lanes_at(s, e);
                real *tile = sums + e * (N + 2);
                from_tile(d->dA + e * N, tile, N, lanes);
                if (d->dD) memcpy(d->dD + e, tile + N * lanes, lanes * sizeof(real));
                if (d->d_bias) memcpy(d->d_bias + e, tile + (N + 1) * lanes, lanes * sizeof(real));
            }
    }
}

// Divide the channels and allocate. Returns false if there is no memory.
static bool begin_work(Work *w, const Scan *s, bool backward) {
    int64_t E = s->d_inner, N = s->d_state, rows = s->batch * s->groups, tiles = ceil_div(E / s->groups, LANES);
    // Wide parts and tasks read memory in long runs, which cut the backward of long sequences by up to a third. But
    // there must be enough parts for many threads, and a few tasks per thread for balance.
    int64_t part_tiles = 8;
    while (part_tiles > 1 && rows * ceil_div(tiles, part_tiles) < 8) part_tiles /= 2;
    int64_t parts = ceil_div(tiles, part_tiles), task_parts = parts;
    int threads = threads_for(s->threads, s->directions * s->batch * s->length * E * N, GRAIN);
    while (task_parts > 1 && threads > 1 && rows * ceil_div(parts, task_parts) < 4 * threads)
        task_parts = (task_parts + 1) / 2;
    *w = (Work){
        .scan = s,
        .threads = threads,
        .task_channels = task_parts * part_tiles * LANES,
        .tasks = ceil_div(parts, task_parts),
        .part_channels = part_tiles * LANES,
        .parts = parts,
    };
    int64_t vectors = backward ? threads * 2 * CHUNK * N : 0, states = s->batch * E * N;
    int64_t sums = backward ? s->batch * E * (N + 2) : 0;
    int64_t shares = backward && w->tasks > 1 ? parts * rows * s->length * N : 0;
    int64_t reals = states + s->directions * (E * N + sums + 2 * shares);
    w->dB_dC = aligned_alloc(sizeof(Vec), (vectors + ceil_div(reals, LANES)) * sizeof(Vec));
    if (!w->dB_dC) return false;
    real *next = (real *)(w->dB_dC + vectors);
    w->state = next, next += states;
    for (int i = 0; i < s->directions; i++) {
        w->of[i].A = next, next += E * N;
        w->of[i].sums = next, next += sums;
        w->of[i].dB = next, next += shares;
        w->of[i].dC = next, next += shares;
        for (int64_t task = 0; task < s->groups * w->tasks; task++) {
            Task t = task_of(w, task);
            for (int64_t e = t.begin; e < t.end; e += LANES)
                to_tile(w->of[i].A + e * N, s->direction[i].A + e * N, N, lanes_at(s, e));
        }
        for (int64_t j = 0; j < E * N; j++) w->of[i].A[j] *= (real)M_LOG2E;
    }
    return true;
}

int scan_forward(const Scan *s) {
    Work w;
    if (!begin_work(&w, s, false)) return -1;
    parallel(s->team, w.threads, s->batch * s->groups * w.tasks, forward_task, &w);
    free(w.dB_dC);
    return 0;
}

int scan_backward(const Scan *s) {
    Work w;
    if (!begin_work(&w, s, true)) return -1;
    parallel(s->team, w.threads, s->batch * s->groups * w.tasks, backward_task, &w);
    if (w.tasks > 1) parallel(s->team, w.threads, s->batch, sum_shares, &w);
    sum_batch(&w);
    free(w.dB_dC);
    return 0;
}

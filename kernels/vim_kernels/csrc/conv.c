// The depthwise causal convolution, forward and backward:
//
//     pre[t] = bias + sum over k of weight[k] * x[t - past + k],    y[t] = silu(pre[t]) or pre[t],    past = width - 1
//
// with zeros for steps of other sequences than t's if several are packed into a row.
//
// A vector holds neighbouring channels. A task is a chunk of steps of one batch element, tile by tile.
#include <stdlib.h>

#include "conv.h"

// STEPS: per task; the backward recomputes `past` more. GRAIN: in outputs, for `threads_for`.
enum { STEPS = 128, GRAIN = 1 << 16 };

typedef struct {
    const Conv *conv;
    int threads;
    int64_t chunks, past;
    real *weight;     // (channels * width tiled)
    real *sums;       // (batch, chunks, channels * (width + 1) tiled): d_weight and d_bias of each task
    Vec *rows;        // (threads, 2, 2 * past + STEPS)
    int64_t *oldest;  // (threads, 2 * past + STEPS), for packed sequences
} Work;

INLINE int lanes_at(const Conv *c, int64_t channel) {
    return c->channels - channel < LANES ? (int)(c->channels - channel) : LANES;
}

// x of steps [start - past, end) of one tile
static void read_rows(Vec *x, const Work *w, int64_t batch, int64_t start, int64_t end, int64_t channel) {
    const Conv *c = w->conv;
    int lanes = lanes_at(c, channel);
    for (int64_t t = start - w->past; t < end; t++) {
        if (t >= 0)
            *x++ = stream(at(c->x, batch, t) + channel, lanes);
        else if (c->initial_state)
            *x++ = load(c->initial_state + (batch * w->past + w->past + t) * c->channels + channel, lanes);
        else
            *x++ = splat(0);
    }
}

// oldest[t - start] of steps [start, end): the first tap that meets a step of the same sequence. The initial state
// counts as part of the first step's sequence. The next `past` entries are 0.
static void find_oldest(int64_t *oldest, const Work *w, int64_t batch, int64_t start, int64_t end) {
    const Conv *c = w->conv;
    for (int64_t t = start; t < end; t++) {
        int64_t k = w->past;
        for (int32_t own = number_at(c->segments, batch, t); k > 0; k--) {
            int64_t before = t - w->past + k - 1;
            if (number_at(c->segments, batch, before > 0 ? before : 0) != own) break;
        }
        *oldest++ = k;
    }
    for (int64_t i = 0; i < w->past; i++) *oldest++ = 0;
}

// pre of a step from the taps `first` and later; *x is the input of tap 0
INLINE Vec convolve(const real *weight, Vec bias, const Vec *x, int64_t first, int64_t width, int lanes) {
    Vec sum = bias;
    for (int64_t k = first; k < width; k++) sum += load(weight + k * lanes, lanes) * x[k];
    return sum;
}

// `packed` is a compile-time constant, so rows of one sequence have no overhead.
INLINE void forward_steps(const Work *w, int64_t task, int thread, bool packed) {
    const Conv *c = w->conv;
    int64_t batch = task / w->chunks, start = task % w->chunks * STEPS;
    int64_t end = start + STEPS < c->length ? start + STEPS : c->length;
    int64_t *oldest = w->oldest + thread * (2 * w->past + STEPS);
    if (packed) find_oldest(oldest, w, batch, start, end);
    Vec *x = w->rows + thread * 2 * (2 * w->past + STEPS);
    for (int64_t e = 0; e < c->channels; e += LANES) {
        int lanes = lanes_at(c, e);
        const real *weight = w->weight + e * c->width;
        Vec bias = c->bias ? load(c->bias + e, lanes) : splat(0);
        read_rows(x, w, batch, start, end, e);
        for (int64_t t = start; t < end; t++) {
            Vec pre = convolve(weight, bias, x + t - start, packed ? oldest[t - start] : 0, c->width, lanes);
            store(at(c->y, batch, t) + e, c->silu ? pre * sigmoid(pre) : pre, lanes);
        }
    }
}

static void forward_task(const void *work, int64_t task, int thread) {
    const Work *w = work;
    if (w->conv->segments.data)
        forward_steps(w, task, thread, true);
    else
        forward_steps(w, task, thread, false);
}

INLINE void backward_steps(const Work *w, int64_t task, int thread, bool packed) {
    const Conv *c = w->conv;
    int64_t batch = task / w->chunks, start = task % w->chunks * STEPS, past = w->past;
    int64_t end = start + STEPS < c->length ? start + STEPS : c->length;
    int64_t ahead = end + past < c->length ? end + past : c->length;
    int64_t *oldest = w->oldest + thread * (2 * past + STEPS);
    if (packed) find_oldest(oldest, w, batch, start, ahead);
    Vec *x = w->rows + thread * 2 * (2 * past + STEPS), *d_pre = x + 2 * past + STEPS;
    for (int64_t e = 0; e < c->channels; e += LANES) {
        int lanes = lanes_at(c, e);
        const real *weight = w->weight + e * c->width;
        Vec bias = c->bias ? load(c->bias + e, lanes) : splat(0);
        read_rows(x, w, batch, start, ahead, e);
        for (int64_t t = start; t < end + past; t++) {
            Vec d = splat(0);
            if (t < ahead) {
                d = stream(at(c->dy, batch, t) + e, lanes);
                if (c->silu) {
                    int64_t first = packed ? oldest[t - start] : 0;
                    Vec pre = convolve(weight, bias, x + t - start, first, c->width, lanes), gate = sigmoid(pre);
                    d *= gate * (1 + pre * (1 - gate));
                }
            }
            d_pre[t - start] = d;
        }
        real *d_weight = w->sums + (task * c->channels + e) * (c->width + 1), *d_bias = d_weight + c->width * lanes;
        for (int64_t k = 0; k < c->width; k++) {
            Vec sum = splat(0);
            for (int64_t i = 0; i < end - start; i++)
                if (!packed || k >= oldest[i]) sum += d_pre[i] * x[i + k];
            store(d_weight + k * lanes, sum, lanes);
        }
        Vec sum = splat(0);
        for (int64_t i = 0; i < end - start; i++) sum += d_pre[i];
        store(d_bias, sum, lanes);

        for (int64_t i = 0; i < end - start; i++) {
            Vec dx = splat(0);
            for (int64_t k = 0; k < c->width; k++)
                if (!packed || k >= oldest[i + past - k]) dx += load(weight + k * lanes, lanes) * d_pre[i + past - k];
            store(at(c->dx, batch, start + i) + e, dx, lanes);
        }
        for (int64_t i = 0; start == 0 && c->d_initial_state && i < past; i++) {
            Vec dx = splat(0);
            for (int64_t k = 0; k <= i; k++)
                if (!packed || k >= oldest[i - k]) dx += load(weight + k * lanes, lanes) * d_pre[i - k];
            store(c->d_initial_state + (batch * past + i) * c->channels + e, dx, lanes);
        }
    }
}

static void backward_task(const void *work, int64_t task, int thread) {
    const Work *w = work;
    if (w->conv->segments.data)
        backward_steps(w, task, thread, true);
    else
        backward_steps(w, task, thread, false);
}

// Returns false if there is no memory.
static bool begin_work(Work *w, const Conv *c, bool backward) {
    int threads = threads_for(c->threads, c->batch * c->length * c->channels, GRAIN);
    *w = (Work){.conv = c, .threads = threads, .chunks = (c->length + STEPS - 1) / STEPS, .past = c->width - 1};
    int64_t vectors = threads * 2 * (2 * w->past + STEPS);
    int64_t reals = c->channels * c->width + (backward ? c->batch * w->chunks * c->channels * (c->width + 1) : 0);
    int64_t numbers = c->segments.data ? vectors / 2 : 0;  // one per vector, in the memory of a vector
    w->rows = aligned_alloc(sizeof(Vec), (vectors + numbers + reals / LANES + 1) * sizeof(Vec));
    if (!w->rows) return false;
    w->oldest = (int64_t *)(w->rows + vectors);
    w->weight = (real *)(w->rows + vectors + numbers);
    w->sums = w->weight + c->channels * c->width;
    for (int64_t e = 0; e < c->channels; e += LANES)
        to_tile(w->weight + e * c->width, c->weight + e * c->width, c->width, lanes_at(c, e));
    return true;
}

int conv_forward(const Conv *c) {
    Work w;
    if (!begin_work(&w, c, false)) return -1;
    parallel(c->team, w.threads, c->batch * w.chunks, forward_task, &w);
    free(w.rows);
    return 0;
}

int conv_backward(const Conv *c) {
    Work w;
    if (!begin_work(&w, c, true)) return -1;
    int64_t tasks = c->batch * w.chunks, size = c->channels * (c->width + 1);
    parallel(c->team, w.threads, tasks, backward_task, &w);
    sum_rows(w.sums, w.sums, tasks, size, size);
    for (int64_t e = 0; e < c->channels; e += LANES) {
        int lanes = lanes_at(c, e);
        const real *tile = w.sums + e * (c->width + 1);
        from_tile(c->d_weight + e * c->width, tile, c->width, lanes);
        if (c->d_bias) memcpy(c->d_bias + e, tile + c->width * lanes, lanes * sizeof(real));
    }
    free(w.rows);
    return 0;
}

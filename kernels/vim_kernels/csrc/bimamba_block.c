// A block of Vision Mamba without gradients:
//
//     x, z = in_proj(rms_norm(input))
//     per direction: u = silu(conv(x)),    dt, B, C = x_proj(u),    dt = dt_proj(dt)
//     output = input + out_proj(scale * (scan of the first direction + scan in reverse of the second) * silu(z))
//
// A call takes the batch in groups whose tensors fit the cache. All groups use the same memory. As operators of their
// own, the steps would get memory fresh from the system: its page faults took a fifth of the time.
#include <stdlib.h>
#include <sys/mman.h>

#include "conv.h"
#include "product.h"
#include "scan.h"

enum {
    STEPS = 16,               // per task of a product
    WIDTH = COLUMNS * LANES,  // outputs of a product at a time: their weights stay in the innermost cache
    GROUP_BYTES = 4 << 20,    // of a group's tensors, per thread
    GRAIN = 1 << 21,          // in multiply-adds, for `threads_for`
    PAIR = 2,                 // of directions
};

// Shapes: B batch, L length, D d_model, E d_inner, N d_state, R dt_rank, W width of the convolution.
typedef struct {
    const real *conv, *conv_bias;            // (E, W), (E) or NULL
    const real *x_proj, *dt_proj, *dt_bias;  // (R + 2 N, E): the rows of dt, B and C; (E, R), (E)
    const real *A_log, *D;                   // (E, N), (E)
} Weights;

typedef struct {
    Team team;
    int64_t threads, batch, length, d_model, d_inner, d_state, dt_rank, width;
    double scale, eps;
    Sequence x, y;                          // (B, L, D)
    const real *norm, *in_proj, *out_proj;  // (D), (2 E, D): the rows of x, then those of z; (D, E)
    Weights direction[PAIR];
} Block;

// A weight (outputs, inputs) as blocks (inputs, WIDTH), one for each WIDTH outputs. The last one is padded with zeros.
typedef struct {
    const real *weight;
    int64_t outputs, inputs;
    real *blocks;
} Linear;

enum { IN_PROJ, OUT_PROJ, X_PROJ, LINEARS = X_PROJ + PAIR };  // X_PROJ: the first of a pair

// The memory of a call. Rows are the steps of a group. There are enough for whole tasks, and rows have whole vectors.
typedef struct {
    const Block *block;
    int threads;
    int64_t first, rows;   // of the group: its first batch element, and its steps
    Matrix xz;             // (rows, 2 E); the scan overwrites x with its output
    Matrix u[PAIR];        // (rows, E)
    Matrix dt_B_C[PAIR];   // (rows, R + 2 N)
    Matrix dt_proj[PAIR];  // (R, E)
    Matrix task_rows;      // (threads, STEPS, D)
    Linear linear[LINEARS];
    real *A[PAIR];  // (E, N)
} Work;

static int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

static void pack_task(const void *work, int64_t task, int thread) {
    (void)thread;
    Linear l = ((const Work *)work)->linear[task];
    for (int64_t begin = 0; begin < l.outputs; begin += WIDTH)
        for (int64_t k = 0; k < l.inputs; k++)
            for (int64_t o = begin; o < begin + WIDTH; o++)
                *l.blocks++ = o < l.outputs ? l.weight[o * l.inputs + k] : 0;
}

// to (STEPS, outputs) = from (STEPS, inputs) weight^T
static void apply(Linear l, Matrix to, Matrix from) {
    Left left = {from.data, from.row, 1, ALL};
    for (int64_t o = 0; o < l.outputs; o += WIDTH) {
        Matrix here = {to.data + o, to.row}, block = {l.blocks + o * l.inputs, WIDTH};
        int64_t width = l.outputs - o < WIDTH ? l.outputs - o : WIDTH;
        product(here, ALL, STEPS, width, left, block, l.inputs, 0);
    }
}

INLINE int lanes_at(const Block *b, int64_t d) {
    return b->d_model - d < LANES ? (int)(b->d_model - d) : LANES;
}

static Matrix from_row(Matrix m, int64_t row) { return (Matrix){m.data + row * m.row, m.row}; }

typedef void (*EachStep)(const Block *b, real *row, real *x, real *y);

// Call each(block, row, x, y) for the steps of a task: `row` of `rows`, the step of the input and that of the output.
INLINE void for_steps(const Work *w, int64_t task, Matrix rows, EachStep each) {
    const Block *b = w->block;
    int64_t start = task * STEPS, steps = w->rows - start < STEPS ? w->rows - start : STEPS;
    for (int64_t i = 0; i < steps; i++) {
        int64_t batch = w->first + (start + i) / b->length, t = (start + i) % b->length;
        each(b, rows.data + i * rows.row, at(b->x, batch, t), at(b->y, batch, t));
    }
}

INLINE void normalise(const Block *b, real *row, real *x, real *y) {
    (void)y;
    Vec squares = {0};
    for (int64_t d = 0; d < b->d_model; d += LANES) {
        Vec v = load(x + d, lanes_at(b, d));
        squares += v * v;
    }
    real factor = 1 / (real)sqrt(sum_lanes(squares) / b->d_model + b->eps);
    for (int64_t d = 0; d < b->d_model; d += LANES) {
        int lanes = lanes_at(b, d);
        store(row + d, load(x + d, lanes) * factor * load(b->norm + d, lanes), lanes);
    }
}

INLINE void add(const Block *b, real *row, real *x, real *y) {
    for (int64_t d = 0; d < b->d_model; d++) y[d] = x[d] + row[d];
}

static void in_task(const void *work, int64_t task, int thread) {
    const Work *w = work;
    Matrix rows = from_row(w->task_rows, thread * STEPS);
    for_steps(w, task, rows, normalise);
    apply(w->linear[IN_PROJ], from_row(w->xz, task * STEPS), rows);
}

static void dt_B_C_task(const void *work, int64_t task, int thread) {
    (void)thread;
    const Work *w = work;
    int64_t start = task / PAIR * STEPS, i = task % PAIR;
    apply(w->linear[X_PROJ + i], from_row(w->dt_B_C[i], start), from_row(w->u[i], start));
}

static void out_task(const void *work, int64_t task, int thread) {
    const Work *w = work;
    Matrix rows = from_row(w->task_rows, thread * STEPS);
    apply(w->linear[OUT_PROJ], rows, from_row(w->xz, task * STEPS));
    for_steps(w, task, rows, add);
}

// The columns of a matrix from `column` on, as direction i reads them.
static Sequence sequence(const Work *w, Matrix m, int64_t column, int i) {
    int64_t length = w->block->length;
    Sequence s = {m.data + column, length * m.row, m.row, 0};
    if (i == 0) return s;
    return (Sequence){s.data + (length - 1) * s.step, s.batch, -s.step, 0};
}

// One group. Returns 0, or -1 if there is no memory.
static int mix(const Work *w) {
    const Block *b = w->block;
    int64_t E = b->d_inner, R = b->dt_rank, N = b->d_state;
    int64_t batch = w->rows / b->length, tasks = ceil_div(w->rows, STEPS);
    Conv conv = {b->team, b->threads, batch, b->length, E, b->width, .silu = true};
    Scan scan = {b->team, b->threads, batch, b->length, E, N, 1, PAIR, true, R, b->scale};

    parallel(b->team, w->threads, tasks, in_task, w);
    for (int i = 0; i < PAIR; i++) {
        const Weights *d = &b->direction[i];
        Sequence x = sequence(w, w->xz, 0, i), u = sequence(w, w->u[i], 0, i);
        conv.x = x, conv.y = u, conv.weight = d->conv, conv.bias = d->conv_bias;
        if (conv_forward(&conv)) return -1;
        scan.direction[i] = (Direction){
            .u = u,
            .dt = sequence(w, w->dt_B_C[i], 0, i),
            .B = sequence(w, w->dt_B_C[i], R, i),
            .C = sequence(w, w->dt_B_C[i], R + N, i),
            .z = sequence(w, w->xz, E, i),
            .y = x,
            .A = w->A[i],
            .D = d->D,
            .dt_bias = d->dt_bias,
            .dt_proj = w->dt_proj[i].data,
        };
    }
    parallel(b->team, w->threads, PAIR * tasks, dt_B_C_task, w);
    if (scan_forward(&scan)) return -1;
    parallel(b->team, w->threads, tasks, out_task, w);
    return 0;
}

typedef struct {
    real *memory;  // NULL while `used` counts
    int64_t used;
} Arena;

static Matrix matrix(Arena *arena, int64_t rows, int64_t columns) {
    Matrix m = {arena->memory ? arena->memory + arena->used : NULL, padded(columns)};
    arena->used += rows * m.row;
    return m;
}

static Linear linear(Arena *arena, const real *weight, int64_t outputs, int64_t inputs) {
    return (Linear){weight, outputs, inputs, matrix(arena, inputs, round_up(outputs, WIDTH)).data};
}

static real *negative_exp(Arena *arena, const real *A_log, int64_t size) {
    real *A = matrix(arena, 1, size).data;
    for (int64_t j = 0; A && j < size; j += LANES) {
        int lanes = size - j < LANES ? (int)(size - j) : LANES;
        store(A + j, -exp2_of(load(A_log + j, lanes) * (real)M_LOG2E), lanes);
    }
    return A;
}

// Returns the size of the memory, in numbers.
static int64_t begin_work(Work *w, int64_t rows, real *memory) {
    const Block *b = w->block;
    int64_t D = b->d_model, E = b->d_inner, R = b->dt_rank, N = b->d_state;
    Arena arena = {memory, 0};
    w->xz = matrix(&arena, rows, 2 * E);
    w->task_rows = matrix(&arena, w->threads * STEPS, D);
    w->linear[IN_PROJ] = linear(&arena, b->in_proj, 2 * E, D);
    w->linear[OUT_PROJ] = linear(&arena, b->out_proj, D, E);
    for (int i = 0; i < PAIR; i++) {
        const Weights *d = &b->direction[i];
        w->u[i] = matrix(&arena, rows, E);
        w->dt_B_C[i] = matrix(&arena, rows, R + 2 * N);
        w->linear[X_PROJ + i] = linear(&arena, d->x_proj, R + 2 * N, E);
        w->dt_proj[i] = matrix(&arena, R, E);
        if (memory) transpose(w->dt_proj[i], d->dt_proj, R, E, R);
        w->A[i] = negative_exp(&arena, d->A_log, E * N);
    }
    return arena.used;
}

// A long sequence gets memory fresh from the system. Huge pages save most of its page faults.
static real *allocate(int64_t numbers) {
    int64_t bytes = round_up(numbers * sizeof(real), sizeof(Vec));
#ifdef MADV_HUGEPAGE
    enum { HUGE_PAGE = 2 << 20 };
    if (bytes >= 4 * HUGE_PAGE) {
        real *memory = aligned_alloc(HUGE_PAGE, round_up(bytes, HUGE_PAGE));
        if (memory) madvise(memory, bytes, MADV_HUGEPAGE);  // may be ignored
        return memory;
    }
#endif
    return aligned_alloc(sizeof(Vec), bytes);
}

// Returns 0, or -1 if there is no memory.
int bimamba_block(const Block *b) {
    int64_t L = b->length, E = b->d_inner;
    int64_t step = padded(2 * E) + PAIR * (padded(E) + padded(b->dt_rank + 2 * b->d_state));
    int64_t most = b->threads * GROUP_BYTES / (L * step * (int64_t)sizeof(real));
    int64_t batch = ceil_div(b->batch, ceil_div(b->batch, most > 1 ? most : 1));  // groups of similar sizes
    Work w = {.block = b, .threads = threads_for(b->threads, batch * L * E * b->d_model, GRAIN)};
    int64_t rows = round_up(batch * L, STEPS), size = begin_work(&w, rows, NULL);
    real *memory = allocate(size);
    if (!memory) return -1;
    begin_work(&w, rows, memory);
    parallel(b->team, w.threads, LINEARS, pack_task, &w);
    int failure = 0;
    for (; w.first < b->batch && !failure; w.first += batch) {
        w.rows = (b->batch - w.first < batch ? b->batch - w.first : batch) * L;
        failure = mix(&w);
    }
    free(memory);
    return failure;
}

// Layouts of tensors in memory.
#pragma once

#include "vector.h"

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// (batch, length, [group,] channels or states), the last dimension contiguous. In reverse, `data` points at the last
// step and `step` is negative, so every loop runs in processing order without a flag.
typedef struct {
    real *data;                  // NULL if absent
    int64_t batch, step, group;  // strides, in elements
} Sequence;

INLINE real *at(Sequence s, int64_t batch, int64_t step) { return s.data + batch * s.batch + step * s.step; }

// Per-step values of packed sequences, (batch, length). `data` is NULL if a row is one sequence.
typedef struct {
    const int8_t *data;
    int64_t batch, step, unused;
} Flags;

INLINE bool flag_at(Flags f, int64_t batch, int64_t step) { return f.data[batch * f.batch + step * f.step]; }

typedef struct {
    const int32_t *data;
    int64_t batch, step, unused;
} Numbers;

INLINE int32_t number_at(Numbers n, int64_t batch, int64_t step) { return n.data[batch * n.batch + step * n.step]; }

// A row of (channels, n) numbers is `tiled` if it is stored as n vectors for each vector of channels (a tile). The last
// tile of a group of channels may have fewer lanes. Tiles take the same memory as rows.
static void to_tile(real *tile, const real *rows, int64_t n, int lanes) {
    for (int64_t j = 0; j < n; j++)
        for (int i = 0; i < lanes; i++) tile[j * lanes + i] = rows[i * n + j];
}

static void from_tile(real *rows, const real *tile, int64_t n, int lanes) {
    for (int64_t j = 0; j < n; j++)
        for (int i = 0; i < lanes; i++) rows[i * n + j] = tile[j * lanes + i];
}

// to[i] = sum over r of from[r * stride + i], in the order of r for any number of threads. `to` may equal `from`.
static void sum_rows(real *to, const real *from, int64_t rows, int64_t stride, int64_t size) {
    memmove(to, from, size * sizeof(real));
    for (int64_t r = 1; r < rows; r++)
        for (int64_t i = 0; i < size; i++) to[i] += from[r * stride + i];
}

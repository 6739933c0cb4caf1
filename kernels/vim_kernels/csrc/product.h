// Small matrix products, and transposition. All matrices have rows padded to whole vectors.
#pragma once

#include "vector.h"

// A block of ROWS rows and COLUMNS vectors stays in registers, beside one row of the right factor.
#if VECTOR_BYTES == 64 || defined(__aarch64__)
enum { ROWS = 8, COLUMNS = 2 };  // 16 of 32 registers
#else
enum { ROWS = 8, COLUMNS = 1 };  // 8 of 16
#endif

enum { PAD = (int)LANES > (int)ROWS ? (int)LANES : (int)ROWS };  // rows and columns are allocated in multiples of it

INLINE int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

// Which entries of a square matrix of steps are not zero, or wanted.
typedef enum { ALL, LOWER, UPPER } Triangle;

typedef struct {
    const real *data;
    int64_t row, column;  // strides
    Triangle triangle;    // of its entries that are not zero
} Left;

typedef struct {
    real *data;
    int64_t row;
} Matrix;

INLINE void block_product(Matrix to, int columns, Left a, Matrix b, int64_t first, int64_t last, real keep) {
    Vec sum[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < columns; c++)
            sum[r][c] = keep ? keep * load(to.data + r * to.row + c * LANES, LANES) : splat(0);
    for (int64_t k = first; k < last; k++) {
        Vec row[COLUMNS];
        UNROLL for (int c = 0; c < columns; c++) row[c] = load(b.data + k * b.row + c * LANES, LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            Vec left = splat(a.data[r * a.row + k * a.column]);
            UNROLL for (int c = 0; c < columns; c++) sum[r][c] += left * row[c];
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < columns; c++) store(to.data + r * to.row + c * LANES, sum[r][c], LANES);
}

// to = keep * to + a b, where a is (rows, inner) and b (inner, columns). Rows are computed in blocks of ROWS, columns
// in whole vectors. `wanted` LOWER skips columns behind the diagonal. If keep is 0, `to` is not read.
static void product(Matrix to, Triangle wanted, int64_t rows, int64_t columns, Left a, Matrix b, int64_t inner,
                    real keep) {
    for (int64_t i = 0; i < rows; i += ROWS) {
        int64_t end = i + ROWS, first = a.triangle == UPPER ? i : 0;
        int64_t last = a.triangle == LOWER && end < inner ? end : inner;
        int64_t width = wanted == LOWER && end < columns ? end : columns;
        Left left = {a.data + i * a.row, a.row, a.column, a.triangle};
        for (int64_t j = 0; j < width;) {
            Matrix here = {to.data + i * to.row + j, to.row}, right = {b.data + j, b.row};
            if (width - j > (COLUMNS - 1) * LANES) {
                block_product(here, COLUMNS, left, right, first, last, keep);
                j += COLUMNS * LANES;
            } else {
                block_product(here, 1, left, right, first, last, keep);
                j += LANES;
            }
        }
    }
}

// to (columns, rows) = from (rows, columns)
static void transpose(Matrix to, const real *from, int64_t from_row, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to.data[j * to.row + i] = from[i * from_row + j];
}

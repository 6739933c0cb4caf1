// The selective scan of one or two directions: see scan.c.
#pragma once

#include "layout.h"
#include "parallel.h"
#include "product.h"

// Shapes: B batch, E d_inner, N d_state, R dt_rank. An absent tensor is NULL, and so is its gradient.
typedef struct {
    Sequence u, dt, B, C, z, y, y_sum;            // z, y, y_sum: shared by the directions
    const real *A, *D, *dt_bias, *initial_state;  // (E, N), (E), (E), (B, E, N)
    real *last_state, *checkpoints;               // (B, E, N), (B, chunks, E * N tiled): states before each chunk
    Flags starts;                                 // whether a step begins a sequence: the state before it is zero
    // For the backward:
    Sequence dy, dz, du, ddt, dB, dC;
    const real *d_last_state;
    real *dA, *dD, *d_bias, *d_initial_state;
    // For a forward without gradients, (R, padded E): with it, dt is (B, L, R), and the step size dt dt_proj.
    const real *dt_proj;
} Direction;

enum { MAX_DIRECTIONS = 2 };

typedef struct {
    Team team;
    int64_t threads, batch, length, d_inner, d_state, groups, directions, softplus, dt_rank;
    double scale;
    Direction direction[MAX_DIRECTIONS];
} Scan;

// Both return 0, or -1 if there is no memory.
int scan_forward(const Scan *s);
int scan_backward(const Scan *s);

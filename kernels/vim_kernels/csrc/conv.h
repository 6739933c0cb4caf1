// The depthwise causal convolution: see conv.c.
#pragma once

#include "layout.h"
#include "parallel.h"

typedef struct {
    Team team;
    int64_t threads, batch, length, channels, width, silu;
    Sequence x, y;
    const real *weight, *bias, *initial_state;  // (channels, width), (channels) or NULL, (batch, past, channels) or NULL
    Numbers segments;                           // the sequence of each step, if several are packed into a row
    // For the backward. The gradient of a NULL tensor is NULL:
    Sequence dy, dx;
    real *d_weight, *d_bias, *d_initial_state;
} Conv;

// Both return 0, or -1 if there is no memory.
int conv_forward(const Conv *c);
int conv_backward(const Conv *c);

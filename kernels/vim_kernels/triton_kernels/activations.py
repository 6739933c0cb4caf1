"""The activations of the Triton kernels, and the constants of exponentials in base 2."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    """In fp32 to 2e-7 of itself: a root and a product take 5 instructions, a division 9."""
    if x.dtype == tl.float64:
        return 1 / (1 + tl.exp2(-x * LOG2E))
    else:
        root = tl.rsqrt(1 + tl.exp2(x * -LOG2E))
        return root * root


@triton.jit
def sigmoids(x):
    """Those of x and of -x: unlike a difference from 1, the smaller one keeps its digits."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    if x.dtype == tl.float64:
        larger = 1 / (1 + e)
    else:
        root = tl.rsqrt(1 + e)
        larger = root * root
    smaller = e * larger
    return tl.where(x >= 0, larger, smaller), tl.where(x >= 0, smaller, larger)


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(exp(-|x|)). In fp32 it equals x above 20, as PyTorch's does."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    if x.dtype == tl.float64:
        w = 1 + e
        log1p = tl.where(x > 20, 0.0, tl.log(w) + (e - (w - 1)) / w)
    else:
        # Minimax polynomial of log1p(e) / e on [0, 1], relative error 1.7e-7 in fp32. log(1 + e) would lose the digits
        # of a small step, and the hardware logarithm would queue for the unit that computes the exponentials.
        p = 0.005232694558799267 * e - 0.02950524352490902
        p = p * e + 0.07822596281766891
        p = p * e - 0.13663247227668762
        p = p * e + 0.19106008112430573
        p = p * e - 0.2484298199415207
        p = p * e + 0.3331909775733948
        p = p * e - 0.4999949336051941
        p = p * e + 0.9999999403953552
        log1p = e * p
    return tl.maximum(x, 0.0) + log1p

"""A figure of linear state spaces: initialisations, three ways to run a system, and discretisation errors."""

import math
from pathlib import Path
from typing import get_args

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from vim.figures import save_figure
from vim.layers.discretize import Rule, discretize_diagonal
from vim.layers.hippo import Diagonal, diagonal
from vim.layers.linear_system import LinearSystem

INITS: tuple[Diagonal, ...] = ("lin", "inv", "legs", "real")
SLOWEST = 4  # states drawn per initialisation


def plot_state_spaces(path: str | Path) -> str:
    """Write a PNG with three parts.

    - Impulse responses of the slowest states of each S4D initialisation.
    - One system as recurrence, sum and convolution, and their differences.
    - The error of each discretisation rule by step size.

    Returns: a line that names the file.
    """
    figure = Figure(figsize=(13, 6), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for axes, init in zip(above.subplots(1, len(INITS), sharey=True), INITS, strict=True):
        _plot_states(axes, init)
    views, differences, errors = below.subplots(1, 3)
    _plot_views(views, differences)
    _plot_errors(errors)
    save_figure(figure, Path(path), 110)
    return f"plot: {path}"


def _plot_states(axes: Axes, init: Diagonal) -> None:
    time = torch.arange(1000, dtype=torch.float64) * 0.005
    A, _ = diagonal(init, 64)
    for state in (A.real.abs() if init == "real" else A.imag.abs()).argsort()[:SLOWEST]:
        axes.plot(time, (A[state] * time).exp().real, linewidth=1)
    axes.set(title=f"S4D, {init}: slowest states", xlabel="time")
    axes.grid(alpha=0.3)


def _system(delta: float, rule: Rule) -> LinearSystem:
    A, B = diagonal("lin", 16)
    C = torch.polar(torch.ones(8), torch.arange(8.0)).to(A.dtype)
    dA, dB = discretize_diagonal(A, B, torch.tensor(delta, dtype=torch.float64), rule)
    return LinearSystem(dA[None], dB[None], 2 * C[None])


def _input(time: Tensor) -> Tensor:
    return ((4 * time).sin() + (9 * time).cos())[None, :, None]


def _plot_views(views: Axes, differences: Axes) -> None:
    time = torch.arange(250, dtype=torch.float64) * 0.02
    system, u = _system(0.02, "zoh"), _input(time)
    recurrence = system.recurrent(u)[0][0, :, 0]
    views.plot(time, recurrence, label="recurrence", linewidth=3, alpha=0.4)
    for name, y, style in (("sum", system.unrolled(u), "--"), ("convolution", system.convolution(u), ":")):
        views.plot(time, y[0, :, 0], style, label=name)
        differences.semilogy(time, (y[0, :, 0] - recurrence).abs().clamp(min=1e-18), label=name, linewidth=1)
    views.set(title="one system, three ways to run it", xlabel="time", ylim=(-5, 8))
    differences.set(title="difference from the recurrence", xlabel="time", ylim=(1e-18, 1e-12))
    for axes in (views, differences):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)


def _plot_errors(axes: Axes) -> None:
    """Errors at time 2 by step size, against zero-order hold with 2^17 steps."""

    def at_the_end(steps: int, rule: Rule) -> float:
        delta = 2 / steps
        middles = (torch.arange(steps, dtype=torch.float64) + 0.5) * delta
        return _system(delta, rule).convolution(_input(middles))[0, -1, 0].item()

    truth = at_the_end(2**17, "zoh")
    steps = [2**k for k in range(7, 13)]
    for rule in get_args(Rule):
        errors = [abs(at_the_end(n, rule) - truth) for n in steps]
        order = math.log2(errors[-2] / errors[-1])
        axes.loglog([2 / n for n in steps], errors, marker="o", label=f"{rule}: order {order:.2f}")
    axes.set(title="error by step size", xlabel="step size")
    axes.legend()
    axes.grid(alpha=0.3)

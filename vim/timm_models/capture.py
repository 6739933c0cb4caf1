"""A CUDA graph of a call."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # needed before a capture; also covers compilation and autotuning


def capture(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What replays the call, on the same inputs, and the tensor that every replay writes its output into.

    The graph uses the memory of the call's inputs and weights: keep them as long as it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Lazy initialisation, compilation and the optimizer state must happen before the capture, and not on the default
    # stream: autograd runs a backward pass on the stream of its forward pass.
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = call()
    return graph.replay, output

"""Some of the random calls of `make sanitize`, without the sanitizers."""

import pytest
import sanitize
import torch

from vim_kernels import available_backends


@pytest.mark.skipif("cpu" not in available_backends(), reason="needs the cpu backend")
def test_random_calls():
    threads = torch.get_num_threads()
    try:
        for number in range(150):
            case, call = sanitize.draw(2, number)
            assert case.compare(*call) is None, number
    finally:
        torch.set_num_threads(threads)

"""Record the kernels that a function launches, and launch all of them again by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")  # a tensor, or several


class CudaGraph(Generic[Result]):
    """A function of CUDA tensors, whose kernels are recorded once and then replayed.

    Each call takes tensors of the same shapes, and overwrites the result of the call before. The
    function may read other tensors as well, which must stay where they are, and may not wait for
    the device.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, function: Callable[..., Result], *inputs: Tensor) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        device = inputs[0].device  # which need not be the current one
        current_stream = torch.cuda.current_stream(device)
        side_stream = torch.cuda.Stream(device)
        side_stream.wait_stream(current_stream)
        with torch.cuda.device(device), torch.cuda.stream(side_stream):
            function(*self.inputs)  # The first call sets up what cannot be recorded.
            torch.cuda.empty_cache()  # A recording has memory of its own.
            # Other threads may copy to the device meanwhile.
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.result = function(*self.inputs)
            finally:
                self.graph.capture_end()
        current_stream.wait_stream(side_stream)

    def __call__(self, *inputs: Tensor) -> Result:
        for recorded, given in zip(self.inputs, inputs):
            recorded.copy_(given)
        self.graph.replay()
        return self.result

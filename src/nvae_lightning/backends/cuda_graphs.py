"""Sampling and training steps as CUDA graphs.

Python launches the thousands of kernels of a deep model one by one, which takes longer than the
GPU's work on small batches. A graph, captured in the first call, launches them together. It reads
weights and statistics from the addresses at capture, so it sees in-place changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nvae_lightning.model.likelihood import Pixels
from nvae_lightning.model.nvae import NVAE, Temperature

_NUM_WARMUP_PASSES = 3  # for compiling, tuning and allocating, which a capture does not allow


class GraphedSampler:
    """Sampler of a fixed number of images at a fixed temperature, as a CUDA graph.

    With the same seed it draws the same images as :meth:`NVAE.sample`. A model that has been moved
    or converted requires a new sampler. All calls run under the autocast of the first.

    Args:
        model: Model to sample from, on a CUDA device and in evaluation mode.
        num_samples: Number of images per call.
        temperature: Factor on the standard deviation of the priors, one or one per scale.

    Raises:
        ValueError: If the model is on another device, or in training mode, where the warm-up
            passes would change its statistics.
    """

    def __init__(self, model: NVAE, num_samples: int, temperature: Temperature = 1.0) -> None:
        self.device = next(model.parameters()).device
        check_device(self.device)
        if any(module.training for module in model.modules()):
            raise ValueError(
                "cuda_graphs: got true, but the model is in training mode; call model.eval() first"
            )
        self.model = model
        self.num_samples = num_samples
        self.temperature = temperature
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Pixels:
        """Draw images, the means of p(x | z)."""
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._images.clone()

    def _draw(self) -> Pixels:
        return self.model.sample(self.num_samples, self.temperature).mean

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with _capturable(self.device):
            with _warming_up(self.device):
                for _ in range(_NUM_WARMUP_PASSES):
                    self._draw()
            with torch.cuda.graph(graph):
                self._images = self._draw()
        return graph


class GraphedLoss:
    """Loss and its gradients as two CUDA graphs, for inputs with the shapes of the first call.

    The next call overwrites the gradients, so they do not accumulate over calls. All calls run
    under the autocast of the first. With the same seed it draws the function's random numbers.

    Args:
        function: Function of tensors that returns the loss and further tensors, which carry no
            gradient. Numbers that change between calls must be among its arguments.
        parameters: Parameters whose gradients are computed, on one CUDA device.
        buffers: Buffers that the function changes; they are restored after the warm-up passes.

    Raises:
        ValueError: If the parameters are on another device.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
    ) -> None:
        self.device = parameters[0].device
        check_device(self.device)
        self.function = function
        self.parameters = parameters
        self.buffers = buffers
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Evaluate the function; inputs of other shapes bypass the graph."""
        if not self._inputs:
            self._capture(inputs)
        if any(a.shape != b.shape for a, b in zip(self._inputs, inputs, strict=True)):
            return self.function(*inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        loss = _Replay.apply(self, *self.parameters)
        return loss, *(other.clone() for other in self._others)

    def replay_forward(self) -> Tensor:
        """Compute all outputs of the function; return the loss."""
        self._forward.replay()
        return self._loss.clone()

    def replay_backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the parameters, given the gradient of the loss."""
        self._grad_loss.copy_(gradient)
        self._backward.replay()
        return tuple(None if g is None else g.detach() for g in self._gradients)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(given.detach().clone() for given in inputs)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        kept = [buffer.clone() for buffer in self.buffers]
        with _capturable(self.device):
            with _warming_up(self.device):
                for _ in range(_NUM_WARMUP_PASSES):
                    loss = self.function(*self._inputs)[0]
                    torch.autograd.grad(loss, self.parameters, allow_unused=True)
                    del loss
            for buffer, value in zip(self.buffers, kept, strict=True):
                buffer.copy_(value)
            # thread_local, so that threads that pin memory do not break the capture.
            with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
                self._loss, *self._others = self.function(*self._inputs)
            self._grad_loss = torch.ones_like(self._loss)
            pool = self._forward.pool()
            with torch.cuda.graph(self._backward, pool=pool, capture_error_mode="thread_local"):
                self._gradients = torch.autograd.grad(
                    self._loss, self.parameters, self._grad_loss, allow_unused=True
                )
        self._loss = self._loss.detach()  # frees the autograd graph


class _Replay(torch.autograd.Function):
    """The loss as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, graphed: GraphedLoss, *parameters: Tensor) -> Tensor:  # noqa: ANN401
        ctx.graphed = graphed
        return graphed.replay_forward()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] -- one output
        ctx: Any,  # noqa: ANN401
        gradient: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return None, *ctx.graphed.replay_backward(gradient)


def check_device(device: torch.device) -> None:
    """Check that a device supports CUDA graphs.

    Raises:
        ValueError: If it is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(
            f"cuda_graphs: got true, but the model is on '{device}'; move it to a CUDA device or "
            "set cuda_graphs=false"
        )


@contextmanager
def _capturable(device: torch.device) -> Iterator[None]:
    """Disable autocast's cache of cast weights, which a graph would read after it is freed."""
    uncached = torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
    with torch.cuda.device(device), uncached:
        yield


@contextmanager
def _warming_up(device: torch.device) -> Iterator[None]:
    """Run on a side stream, with random number generators restored."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.random.fork_rng([device]), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)

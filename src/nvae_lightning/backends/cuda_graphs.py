"""Sampling and the steps of a training as CUDA graphs.

Python launches the thousands of kernels of a deep model one by one, which takes longer than a GPU
needs to compute small batches. A graph, captured at the first call, launches them at once. It
finds weights and statistics where they lay when it was captured: what is changed in place is seen.
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

_NUM_WARMUP_PASSES = 3  # in which torch compiles, tunes and allocates what a capture cannot


class GraphedSampler:
    """Draws images of one number and temperature by a CUDA graph.

    For one seed it draws the images that :meth:`NVAE.sample` draws. A model that is moved or
    converted takes a new sampler. The autocast of the first call is that of all.

    Args:
        model: what is sampled from, on a CUDA device and in evaluation mode.
        num_samples: number of images of a call.
        temperature: factor on the standard deviation of the priors, one or one per scale.

    Raises:
        ValueError: if the model is on another device, or in training mode, where the passes before
            the capture would change its statistics.
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
        """Draw images: means of p(x | z)."""
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
    """Computes a loss and its gradients by two CUDA graphs, for inputs of the shapes of the first.

    Gradients are in memory that the next call overwrites: they do not add up over several calls.
    The autocast of the first call is that of all. For one seed it draws what the function draws.

    Args:
        function: given tensors, returns the loss and further tensors, through which no gradient
            flows. Numbers that change from call to call are to be among those tensors.
        parameters: whose gradients are wanted, on one CUDA device.
        buffers: that the function changes, and that the passes before the capture are not to.

    Raises:
        ValueError: if the parameters are on another device.
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
        """Compute what the function returns; inputs of other shapes without the graph."""
        if not self._inputs:
            self._capture(inputs)
        if any(a.shape != b.shape for a, b in zip(self._inputs, inputs, strict=True)):
            return self.function(*inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        loss = _Replay.apply(self, *self.parameters)
        return loss, *(other.clone() for other in self._others)

    def replay_forward(self) -> Tensor:
        """Compute all that the function returns; return the loss."""
        self._forward.replay()
        return self._loss.clone()

    def replay_backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the parameters, given that of the loss."""
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
            # Threads that read the next images into pinned memory do not spoil the capture.
            with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
                self._loss, *self._others = self.function(*self._inputs)
            self._grad_loss = torch.ones_like(self._loss)
            pool = self._forward.pool()
            with torch.cuda.graph(self._backward, pool=pool, capture_error_mode="thread_local"):
                self._gradients = torch.autograd.grad(
                    self._loss, self.parameters, self._grad_loss, allow_unused=True
                )
        self._loss = self._loss.detach()  # what led to it is of no further use


class _Replay(torch.autograd.Function):
    """The loss as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, graphed: GraphedLoss, *parameters: Tensor) -> Tensor:  # noqa: ANN401
        ctx.graphed = graphed
        return graphed.replay_forward()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] -- of one output
        ctx: Any,  # noqa: ANN401
        gradient: Tensor,
    ) -> tuple[Tensor | None, ...]:
        return None, *ctx.graphed.replay_backward(gradient)


def check_device(device: torch.device) -> None:
    """Check that there can be graphs on a device.

    Raises:
        ValueError: if it is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(
            f"cuda_graphs: got true, but the model is on '{device}'; move it to a CUDA device, "
            "or leave cuda_graphs out"
        )


@contextmanager
def _capturable(device: torch.device) -> Iterator[None]:
    """Keep no weights that autocast casts: they end with it, and a graph would read them still."""
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
    """Compute beside what is captured later, without taking random numbers from it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Those who draw with one seed draw the same, with a graph or without.
    with torch.random.fork_rng([device]), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)

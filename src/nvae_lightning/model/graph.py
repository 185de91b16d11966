"""Sampling as one CUDA graph."""

from __future__ import annotations

import torch

from nvae_lightning.model.nvae import NVAE, Pixels, Temperature

_NUM_WARMUP_PASSES = 3  # in which torch compiles, tunes and allocates what a capture cannot


class GraphedSampler:
    """Draws images of one number and temperature by a CUDA graph.

    Python launches the thousands of kernels of a deep model one by one, which takes longer than a
    GPU needs to compute small batches. A graph, captured at the first call, launches them at once.
    For one seed it draws the images that :meth:`NVAE.sample` draws.

    The graph finds weights and statistics where they lay when it was captured. What is changed in
    place is seen; a model that is moved or converted takes a new sampler. The autocast of the
    first call is that of all.

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
        if self.device.type != "cuda":
            raise ValueError(
                f"cuda_graphs: got true, but the model is on '{self.device}'; move it to a CUDA "
                "device, or leave cuda_graphs out"
            )
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
        kind = self.device.type
        # Weights that autocast keeps in 16 bits end with it, and the graph would read them still.
        uncached = torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        with torch.cuda.device(self.device), uncached:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Those who draw with one seed draw the same, with a graph or without.
            with torch.random.fork_rng([self.device]), torch.cuda.stream(stream):
                for _ in range(_NUM_WARMUP_PASSES):
                    self._draw()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self._images = self._draw()
        return graph

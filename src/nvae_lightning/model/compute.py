"""How a model is computed: the same numbers, up to rounding, in other time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import nn

from nvae_lightning.model.cells import ResidualCell
from nvae_lightning.model.compiler import inductor
from nvae_lightning.model.decoder import LatentGroup
from nvae_lightning.model.encoder import Encoder
from nvae_lightning.model.fused import (
    AutoKernels,
    CompiledKernels,
    TorchKernels,
    TritonKernels,
)
from nvae_lightning.model.likelihood import Likelihood
from nvae_lightning.model.normalization import BatchNorm, Recompute

#: Cells are of few kinds, but each kind comes in several widths, resolutions and modes.
_MOST_KINDS_OF_CELLS = 256


def _recomputing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:  # noqa: ANN401
    """Torch's compiler, which by itself keeps what costs anything to compute anew."""
    with torch._functorch.config.patch(aggressive_recomputation=True):
        return inductor(graph, inputs)


@dataclass(frozen=True)
class Compute:
    """Settings of speed and memory; weights and state dict know nothing of them.

    Args:
        compile: whether the model is compiled piece by piece, when they are first used: latent
            groups with their cells and draws, the encoder's groups, and the cells before and
            after them. Pieces of one shape share what was compiled, so that it takes a minute or
            two, not the many that the whole model takes.
        kernels: what normalisation and swish are computed by: ``torch``'s operations, formulas
            that torch's compiler has ``compiled``, or ``triton`` kernels, which also compute the
            depthwise convolution (GPU). ``auto`` is triton on a GPU that has it; elsewhere
            compiled in compiled cells, else torch.
        recompute: what the backward pass computes anew rather than keeping it: ``nothing`` (torch
            then computes all normalisation), ``normalization`` (the paper, Sec. 3.1.3: of BN and
            swish one feature map is kept) or ``activation`` (of BN, swish and the convolution
            after them one map is kept).
        checkpoint_min_size: cells whose input is at least so many pixels wide keep nothing but
            that input; the backward pass computes them anew. None for no such cells.

    Raises:
        ValueError: if a setting is not one of those, or the other kernels have nothing to compute.
    """

    compile: bool = False
    kernels: Literal["auto", "torch", "compiled", "triton"] = "auto"
    recompute: Literal["nothing", "normalization", "activation"] = "activation"
    checkpoint_min_size: int | None = None

    def __post_init__(self) -> None:
        if self.kernels not in ("auto", *_KERNELS):
            raise ValueError(
                f"compute.kernels must be auto, {', '.join(_KERNELS)}, got {self.kernels!r}"
            )
        if self.recompute not in [one.value for one in Recompute]:
            raise ValueError(
                "compute.recompute must be nothing, normalization or activation, got "
                f"{self.recompute!r}"
            )
        if self.recompute == "nothing" and self.kernels in ("compiled", "triton"):
            raise ValueError(
                f"compute.kernels: got {self.kernels}, which compute.recompute=nothing has no use "
                "for; set compute.recompute=normalization or activation, or compute.kernels=auto"
            )
        if self.checkpoint_min_size is not None and self.checkpoint_min_size < 1:
            raise ValueError(
                "compute.checkpoint_min_size must be at least 1, or null for no checkpointing, "
                f"got {self.checkpoint_min_size}"
            )

    def apply(self, model: nn.Module) -> None:
        """Let a model be computed so, in place.

        What was compiled stays so; copies of a compiled model are not compiled.
        """
        if self.kernels == "auto":
            kernels = AutoKernels(CompiledKernels() if self.compile else TorchKernels())
        else:
            kernels = _KERNELS[self.kernels]()
        if isinstance(kernels, CompiledKernels) or self.compile:
            torch._dynamo.config.recompile_limit = _MOST_KINDS_OF_CELLS
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.kernels = kernels
                module.recompute = Recompute(self.recompute)
            if isinstance(module, ResidualCell):
                module.checkpoint_min_size = self.checkpoint_min_size
            if isinstance(module, Likelihood):
                module.compile_log_prob = self.compile
        if self.compile:
            backend = "inductor" if self.recompute == "nothing" else _recomputing
            for piece in self._pieces(model):
                piece.compile(backend=backend, dynamic=False)

    def _pieces(self, module: nn.Module) -> Iterator[nn.Module]:
        """Find what to compile: as much in one as is repeated."""
        if self.checkpoint_min_size is not None:  # what is computed twice is not compiled whole
            yield from (cell.body for cell in module.modules() if isinstance(cell, ResidualCell))
        elif isinstance(module, ResidualCell | LatentGroup):
            yield module
        elif isinstance(module, Encoder):
            yield from self._pieces(module.preprocess)
            yield from module.groups
        else:
            for child in module.children():
                yield from self._pieces(child)


_KERNELS = {"torch": TorchKernels, "compiled": CompiledKernels, "triton": TritonKernels}

"""How a model is computed: the same numbers, up to rounding, in other time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import nn

from nvae_lightning.backends.checkpointing import CheckpointedCell, checkpointed
from nvae_lightning.backends.compiled_kernels import CompiledKernels
from nvae_lightning.backends.compiled_likelihood import CompiledMixtureLikelihood
from nvae_lightning.backends.compiler import inductor
from nvae_lightning.backends.folding import FoldingSequential
from nvae_lightning.backends.kernels import AutoKernels, TorchKernels, TritonKernels
from nvae_lightning.backends.units import FusedBatchNorm, FusedUnit
from nvae_lightning.model.cells import ResidualCell
from nvae_lightning.model.decoder import LatentGroup
from nvae_lightning.model.encoder import Encoder
from nvae_lightning.model.layers import NormActConv
from nvae_lightning.model.likelihood import DiscretizedLogisticMixtureLikelihood
from nvae_lightning.model.normalization import BatchNorm

_KERNELS = {"torch": TorchKernels, "compiled": CompiledKernels, "triton": TritonKernels}
_RECOMPUTE = ("nothing", "normalization", "activation")

#: Cells are of few kinds, but each kind comes in several widths, resolutions and modes.
_MOST_KINDS_OF_CELLS = 256


def _recomputing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:  # noqa: ANN401
    """Compile a graph; the default would keep whatever costs anything to recompute."""
    with torch._functorch.config.patch(aggressive_recomputation=True):
        return inductor(graph, inputs)


@dataclass(frozen=True)
class Compute:
    """Settings of speed and memory.

    They are applied by giving the model's layers subclasses of their classes, so that weights,
    state dict, copies and hooks are those of the plain layers.

    Args:
        compile: Whether the model is compiled, piece by piece at first use: latent groups with
            their cells and draws, the encoder's groups, and the cells before and after them.
            Pieces of one shape share what was compiled, so that it takes a minute or two instead
            of the many that the whole model would.
        kernels: Implementation of normalisation and swish: ``torch``'s operations, formulas
            ``compiled`` by torch, or ``triton`` kernels, which include the depthwise convolution
            (GPU only). ``auto`` is triton on a GPU that supports it; elsewhere compiled in
            compiled cells, otherwise torch.
        recompute: Activation recomputation in the backward pass: ``nothing``, ``normalization``
            (the paper, Sec. 3.1.3: of BN and swish one feature map is kept) or ``activation`` (of
            BN, swish and the convolution after them one map is kept).
        checkpoint_min_size: Width in pixels from which on only a cell's input is kept and the
            backward pass recomputes the cell; None for no such cells.

    Raises:
        ValueError: If a setting is unknown, or kernels are chosen that would not be used.
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
        if self.recompute not in _RECOMPUTE:
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
        """Apply the settings to a model in place.

        What has been compiled stays compiled; copies of a compiled model are not.
        """
        kernels = self._kernels()
        if isinstance(kernels, CompiledKernels) or self.compile:
            torch._dynamo.config.recompile_limit = _MOST_KINDS_OF_CELLS
        for module in model.modules():
            self._implement(module, kernels)
        if self.compile:
            backend = "inductor" if self.recompute == "nothing" else _recomputing
            for piece in self._pieces(model):
                piece.compile(backend=backend, dynamic=False)

    def _kernels(self) -> TorchKernels:
        if self.kernels == "auto":
            return AutoKernels(CompiledKernels() if self.compile else TorchKernels())
        return _KERNELS[self.kernels]()

    def _implement(self, module: nn.Module, kernels: TorchKernels) -> None:
        """Choose the implementation of one module; classes of others than ours keep theirs."""
        kind, is_fused = type(module), self.recompute != "nothing"
        if kind in (BatchNorm, FusedBatchNorm):
            _become(module, FusedBatchNorm if is_fused else BatchNorm, kernels=kernels)
        elif isinstance(module, NormActConv) and kind in (NormActConv, FusedUnit):
            is_fused = is_fused and FusedUnit.supports(module)
            recomputes = self.recompute == "activation"
            _become(
                module, FusedUnit if is_fused else NormActConv, kernels=kernels,
                recomputes_activation=recomputes,
            )  # fmt: skip
        elif isinstance(module, ResidualCell):
            if type(module.body) is nn.Sequential:
                _become(module.body, FoldingSequential)
            plain = module.plain if isinstance(module, CheckpointedCell) else type(module)
            is_plain = self.checkpoint_min_size is None
            _become(
                module, plain if is_plain else checkpointed(plain),
                min_size=self.checkpoint_min_size,
            )  # fmt: skip
        elif kind in (DiscretizedLogisticMixtureLikelihood, CompiledMixtureLikelihood):
            compiled, plain = CompiledMixtureLikelihood, DiscretizedLogisticMixtureLikelihood
            _become(module, compiled if self.compile else plain)

    def _pieces(self, module: nn.Module) -> Iterator[nn.Module]:
        """Find the largest modules that are repeated, each of which is compiled whole."""
        if self.checkpoint_min_size is not None:  # a cell that is computed twice is not
            yield from (cell.body for cell in module.modules() if isinstance(cell, ResidualCell))
        elif isinstance(module, ResidualCell | LatentGroup):
            yield module
        elif isinstance(module, Encoder):
            yield from self._pieces(module.preprocess)
            yield from module.groups
        else:
            for child in module.children():
                yield from self._pieces(child)


def _become(module: nn.Module, kind: type[nn.Module], **settings: object) -> None:
    """Give a module another class, as torch's FSDP does, and the settings of that class."""
    module.__class__ = kind
    module.__dict__.update(settings)

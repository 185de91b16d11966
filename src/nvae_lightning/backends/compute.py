"""Settings of speed and memory: the same numbers, up to rounding, in less time or memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import nn

from nvae_lightning.backends.compiled import (
    CompiledKernels,
    CompiledMixtureLikelihood,
    for_any_batch,
    inductor,
)
from nvae_lightning.backends.kernels import TorchKernels
from nvae_lightning.backends.triton_operations import TritonKernels
from nvae_lightning.backends.units import (
    FoldingSequential,
    FusedBatchNorm,
    FusedUnit,
    recomputed,
)
from nvae_lightning.model.cells import ResidualCell
from nvae_lightning.model.decoder import LatentGroup
from nvae_lightning.model.encoder import Encoder
from nvae_lightning.model.layers import NormActConv
from nvae_lightning.model.likelihood import DiscretizedLogisticMixtureLikelihood
from nvae_lightning.model.normalization import BatchNorm

_KERNELS = {"torch": TorchKernels, "compiled": CompiledKernels, "triton": TritonKernels}
_RECOMPUTE = ("auto", "nothing", "normalization", "activation")

#: There are few kinds of cells, but each in several widths, resolutions and modes.
_RECOMPILE_LIMIT = 256


def _recomputing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:  # noqa: ANN401
    """Compile a graph; by default the compiler would keep whatever costs time to recompute."""
    with torch._functorch.config.patch(aggressive_recomputation=True):
        return inductor(graph, inputs)


@dataclass(frozen=True)
class Compute:
    """Settings of speed and memory.

    :meth:`apply` gives the layers of a model subclasses of their classes, and recomputed cells
    another forward pass. Weights, state dict, copies and hooks stay those of the plain layers, and
    it can be applied again with other settings. Without it, a model runs the plain layers of
    ``model/``.

    Args:
        compile: Whether to compile the model, piece by piece at first use: latent groups with
            their cells and draws, the encoder's groups, and the cells before and after them.
            Pieces of one shape share compiled code, so that compilation takes a few minutes
            instead of many for the model as a whole.
        kernels: Implementation of normalisation and swish: operations of ``torch``, formulas
            ``compiled`` by torch, or ``triton`` kernels, which include the depthwise convolution
            (GPU only). ``auto`` is compiled if ``compile`` is set, otherwise torch.
        recompute: Activation recomputation in the backward pass: ``nothing``, ``normalization``
            (the paper, Sec. 3.1.3: one feature map is kept for BN and swish) or ``activation``
            (one feature map is kept for BN, swish and the convolution after them). ``auto`` is
            activation where kernels are compiled or in Triton. Elsewhere it is nothing, because
            recomputation then saves half of the memory but costs a fifth of the speed.
        checkpoint_min_size: Smallest width in pixels of cells that are recomputed as a whole,
            from their input; None recomputes no whole cell.

    Raises:
        ValueError: If a setting is unknown, or the kernels would not be used.
    """

    compile: bool = False
    kernels: Literal["auto", "torch", "compiled", "triton"] = "auto"
    recompute: Literal["auto", "nothing", "normalization", "activation"] = "auto"
    checkpoint_min_size: int | None = None

    def __post_init__(self) -> None:
        if self.kernels not in ("auto", *_KERNELS):
            raise ValueError(
                f"compute.kernels must be auto, {', '.join(_KERNELS)}, got {self.kernels!r}"
            )
        if self.recompute not in _RECOMPUTE:
            raise ValueError(
                f"compute.recompute must be {', '.join(_RECOMPUTE[:-1])} or {_RECOMPUTE[-1]}, "
                f"got {self.recompute!r}"
            )
        if self.recompute == "nothing" and self.kernels in ("compiled", "triton"):
            raise ValueError(
                f"compute.kernels: got {self.kernels}, which compute.recompute=nothing does not "
                "use; set compute.recompute=normalization or activation, or compute.kernels=auto"
            )
        if self.checkpoint_min_size is not None and self.checkpoint_min_size < 1:
            raise ValueError(
                "compute.checkpoint_min_size must be at least 1, or null for no checkpointing, "
                f"got {self.checkpoint_min_size}"
            )

    def apply(self, model: nn.Module) -> None:
        """Apply the settings to ``model`` in place; its copies are not compiled.

        Raises:
            ValueError: If something is to be compiled and this machine has no compiler.
        """
        usual = "compiled" if self.compile else "torch"
        kernels = _KERNELS[usual if self.kernels == "auto" else self.kernels]()
        if isinstance(kernels, CompiledKernels) or self.compile:
            _check_compiler()
            torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
        for module in model.modules():
            self._implement(module, kernels)
            module.__dict__.pop("_compiled_call_impl", None)  # undoes an earlier compilation
        if self.compile:
            backend = _recomputing if self._recomputes else "inductor"
            for piece in self._pieces(model):
                piece.compile(backend=backend, dynamic=False)
                assert piece._compiled_call_impl is not None
                piece._compiled_call_impl = for_any_batch(piece._compiled_call_impl)

    @property
    def _recomputes(self) -> bool:
        if self.recompute != "auto":
            return self.recompute != "nothing"
        return self.compile or self.kernels in ("compiled", "triton")

    def _implement(self, module: nn.Module, kernels: TorchKernels) -> None:
        """Set the implementation of one module; classes from elsewhere keep theirs."""
        kind, is_fused = type(module), self._recomputes
        if kind in (BatchNorm, FusedBatchNorm):
            _become(module, FusedBatchNorm if is_fused else BatchNorm, kernels=kernels)
        elif isinstance(module, NormActConv) and kind in (NormActConv, FusedUnit):
            is_fused = is_fused and FusedUnit.supports(module)
            recomputes = self.recompute != "normalization"
            _become(
                module, FusedUnit if is_fused else NormActConv, kernels=kernels,
                recomputes_activation=recomputes,
            )  # fmt: skip
        elif isinstance(module, ResidualCell):
            if type(module.body) is nn.Sequential:
                _become(module.body, FoldingSequential)
            module.__dict__.pop("forward", None)
            if self.checkpoint_min_size is not None:
                module.forward = partial(recomputed, module, self.checkpoint_min_size)
        elif kind in (DiscretizedLogisticMixtureLikelihood, CompiledMixtureLikelihood):
            compiled, plain = CompiledMixtureLikelihood, DiscretizedLogisticMixtureLikelihood
            _become(module, compiled if self.compile else plain)

    def _pieces(self, module: nn.Module) -> Iterator[nn.Module]:
        """Find the largest repeated modules, each of which is compiled as a whole."""
        if self.checkpoint_min_size is not None:  # a recomputed cell cannot be compiled
            yield from (cell.body for cell in module.modules() if isinstance(cell, ResidualCell))
        elif isinstance(module, ResidualCell | LatentGroup):
            yield module
        elif isinstance(module, Encoder):
            yield from self._pieces(module.preprocess)
            yield from module.groups
        else:
            for child in module.children():
                yield from self._pieces(child)


def _check_compiler() -> None:
    """Check that there is a compiler for the C++ that torch generates, and Triton's C."""
    known = os.environ.get("CXX"), os.environ.get("CC"), "g++", "clang++", "gcc", "clang", "cl"
    if not any(name and shutil.which(name.split()[0]) for name in known):
        raise ValueError(
            "compile: torch requires a C++ compiler, and none was found on PATH; install one "
            "(on Debian and Ubuntu: apt-get install g++), or set compile=false"
        )


def _become(module: nn.Module, kind: type[nn.Module], **settings: object) -> None:
    """Give a module another class, as torch's FSDP does, and the settings of that class."""
    module.__class__ = kind
    module.__dict__.update(settings)

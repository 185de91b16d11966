"""Weights from files, compared with the model that they are said to be of before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nvae_lightning.model.cells import RegularCell
from nvae_lightning.model.hierarchy import Hierarchy, Image
from nvae_lightning.utilities.plain_data import shown

#: Modules that are built whatever the weights are, so that the error can name what differs.
_FEW_MODULES = 10_000


def weights_of(prefix: str, weights: Mapping[Any, Any]) -> dict[str, Any]:
    """Pick the weights of a part from a state dict, by their names in the part."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if isinstance(name, str) and name.startswith(prefix)
    }


def check_sizes(arguments: Mapping[str, Any], num_weights: int) -> None:
    """Compare how many modules a model would have with how many weights there are.

    Every group, cell and flow has weights: a description that asks for more of them than there
    are weights is wrong, and would be built for hours.

    Args:
        arguments: the model's constructor arguments.
        num_weights: number of tensors.

    Raises:
        ValueError: if it asks for more, or a cell's dilation exceeds the image.
    """
    image, hierarchy = arguments.get("image"), arguments.get("hierarchy")
    if not isinstance(image, Image) or not isinstance(hierarchy, Hierarchy):
        return  # the constructor says so

    def layers(name: str, cell: str) -> int:
        number, constructor = arguments.get(name, 2), arguments.get(cell)
        if not isinstance(number, int):
            return 0
        if not (isinstance(constructor, partial) and constructor.func is RegularCell):
            return number
        dilations = constructor.keywords.get("dilations", (1, 1))
        if max(dilations, default=1) > image.padded_size:
            raise ValueError(
                f"{cell}.dilations: {shown(max(dilations))} is more than the image's side of "
                f"{image.padded_size}"
            )
        return number * len(dilations)

    flows = arguments.get("num_flows", 0)
    per_group = 1 + layers("num_encoder_cells", "encoder_cell") + 2 * flows
    per_group += layers("num_decoder_cells", "decoder_cell")
    per_halving = layers("num_preprocess_cells", "preprocess_cell")
    per_halving += layers("num_postprocess_cells", "postprocess_cell")
    halvings = hierarchy.scales[-1].num_halvings
    num_modules = hierarchy.num_groups * per_group + halvings * per_halving
    if num_modules > max(num_weights, _FEW_MODULES):
        raise ValueError(
            f"the description asks for more than {num_modules - 1:,} groups, cells and flows, but "
            f"there are only {num_weights:,} weights: they are of another model"
        )


def check_tensors(
    weights: Mapping[str, Any], own: Mapping[str, Tensor], *, may_share: bool = False
) -> None:
    """Check that weights are plain tensors of the kinds of numbers that a model holds.

    Args:
        weights: what was read, by name.
        own: the model's parameters and buffers; others are left to whoever loads the weights.
        may_share: whether two weights may be one tensor.

    Raises:
        ValueError: if a tensor is sparse, quantised, not in memory, or repeats numbers instead of
            holding them; or if it holds, say, whole numbers where the model has real ones.
    """
    held: dict[int, int] = {}
    num_bytes = 0
    for name, value in weights.items():
        if not isinstance(value, Tensor) or name not in own:
            continue
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{name} is not a dense tensor of plain numbers in memory")
        if _kind(value) != _kind(own[name]):
            raise ValueError(
                f"{name} holds {_dtype(value)}, where the model has {_dtype(own[name])}: weights "
                "of another kind are not converted"
            )
        storage = value.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        num_bytes += value.numel() * value.element_size()
        if _repeats(value):
            raise ValueError(f"{name} repeats numbers instead of holding all of them")
    if num_bytes > sum(held.values()) and not may_share:
        raise ValueError("some weights share their memory, as no model's do")


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Check that weights are numbers.

    Raises:
        ValueError: if some are NaN or infinite.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not (finite := value.isfinite()).all():
            number = value.numel() - int(finite.sum())
            raise ValueError(
                f"{name} holds {number:,} of {value.numel():,} numbers that are NaN or infinite: "
                "the training has diverged, take an earlier checkpoint; allow_nonfinite=True "
                "loads them all the same"
            )


def _kind(value: Tensor) -> str:
    if value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return "real"
    is_other = value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    return str(value.dtype) if is_other else "whole"


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _repeats(value: Tensor) -> bool:
    """Whether several elements of a tensor are one place in memory."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < expected:
                return True
            expected = stride * size
    return False


def outline_of(kind: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Build a model without memory for its weights.

    Raises:
        ValueError: if it cannot be built.
    """
    try:
        with torch.device("meta"):
            return kind(**arguments)
    except (RuntimeError, TypeError, OverflowError) as error:  # of sizes beyond all memory, too
        reason = " ".join(str(error).split())
        raise ValueError(f"no such model can be built ({reason})") from error


def build_of_weights(
    kind: type[nn.Module],
    arguments: Mapping[str, Any],
    weights: Mapping[str, Any],
    *,
    has_foreign: bool = False,
    allow_nonfinite: bool = False,
) -> nn.Module:
    """Build a model and load its weights; first one without memory, which they have to fit.

    Args:
        kind: class of the model.
        arguments: arguments of its constructor.
        weights: its state dict.
        has_foreign: whether some arguments are a caller's, whose modules may need memory.
        allow_nonfinite: whether weights may be NaN or infinite.

    Raises:
        ValueError: if the weights are not those of a model of this description; or whatever the
            constructor and ``load_state_dict`` raise.
    """
    check_sizes(arguments, len(weights))
    outline = None
    try:
        outline = outline_of(kind, arguments)
    except Exception:
        if not has_foreign:
            raise
    if outline is not None:
        check_tensors(weights, outline.state_dict(), may_share=has_foreign)
        outline.load_state_dict(weights, assign=True)
    model = kind(**arguments)
    if outline is None:
        check_tensors(weights, model.state_dict(), may_share=True)
    model.load_state_dict(weights)
    if not allow_nonfinite:
        check_finite(model.state_dict())
    return model

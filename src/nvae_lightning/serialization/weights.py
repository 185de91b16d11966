"""Weights from files, checked against their model before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from nvae_lightning.model.cells import RegularCell
from nvae_lightning.model.hierarchy import Hierarchy
from nvae_lightning.serialization.architecture import check_arguments, restore
from nvae_lightning.utilities.image import Image
from nvae_lightning.utilities.plain_data import shown

#: Models this small are always built, so that the error can name the differences.
_FEW_MODULES = 10_000


def build(
    kind: type[Any],
    description: object,
    weights: Mapping[str, Any],
    given: Mapping[str, object],
    *,
    allow_nonfinite: bool = False,
) -> Any:  # noqa: ANN401
    """Build a model from its description and load its weights, in evaluation mode.

    Args:
        kind: Class of the model.
        description: Its constructor arguments as plain data.
        weights: Its state dict.
        given: Arguments that replace described ones.
        allow_nonfinite: Whether weights may be NaN or infinite.

    Raises:
        ValueError: If the description is malformed, or the weights belong to another model.
    """
    try:
        arguments = restore(description, given)
        check_arguments("", kind, arguments)
        model = build_from_weights(
            kind, arguments, weights, has_foreign=bool(given), allow_nonfinite=allow_nonfinite
        )
    except Exception as error:  # malformed data cause errors of many classes
        raise ValueError(one_line(error)) from error
    return model.eval()


def one_line(error: Exception) -> str:
    """Shorten the message of an error to one line, without listing every weight."""
    is_text = isinstance(error, OSError | RuntimeError | TypeError | ValueError)
    return shorten(str(error) if is_text else repr(error), 500, placeholder=" ...") or repr(error)


def weights_of(prefix: str, weights: Mapping[Any, Any]) -> dict[str, Any]:
    """Select the weights of a part from a state dict, by their names in the part."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if isinstance(name, str) and name.startswith(prefix)
    }


def check_sizes(arguments: Mapping[str, Any], num_weights: int) -> None:
    """Compare the number of a model's modules with the number of weights.

    Every group, cell and flow has weights. A description with more of them than there are weights
    is wrong, and its model could take hours to build.

    Args:
        arguments: Constructor arguments of the model.
        num_weights: Number of tensors.

    Raises:
        ValueError: If there are too few weights, or a cell's dilation exceeds the image.
    """
    image, hierarchy = arguments.get("image"), arguments.get("hierarchy")
    if not isinstance(image, Image) or not isinstance(hierarchy, Hierarchy):
        return  # the constructor reports it

    def layers(name: str, cell: str) -> int:
        number, constructor = arguments.get(name, 2), arguments.get(cell)
        if not isinstance(number, int):
            return 0
        if not (isinstance(constructor, partial) and constructor.func is RegularCell):
            return number
        dilations = constructor.keywords.get("dilations", (1, 1))
        if max(dilations, default=1) > image.padded_size:
            raise ValueError(
                f"{cell}.dilations: {shown(max(dilations))} exceeds the image size "
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
            f"there are only {num_weights:,} weights: they belong to another model"
        )


def check_tensors(
    weights: Mapping[str, Any], own: Mapping[str, Tensor], *, may_share: bool = False
) -> None:
    """Check that weights are plain dense tensors of the model's kinds of dtype.

    Args:
        weights: Tensors that were read, by name.
        own: Parameters and buffers of the model; other names are left for loading to report.
        may_share: Whether two weights may share memory.

    Raises:
        ValueError: If a tensor is sparse, quantised, not in memory, expanded from fewer values,
            or, for example, of integers where the model has floating-point numbers.
    """
    held: dict[int, int] = {}
    num_bytes = 0
    for name, value in weights.items():
        if not isinstance(value, Tensor) or name not in own:
            continue
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{name} is not a plain dense tensor in memory")
        if _kind(value) != _kind(own[name]):
            raise ValueError(
                f"{name} has dtype {value.dtype}, but the model has {own[name].dtype}; "
                "convert the weights first"
            )
        storage = value.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        size = value.numel() * value.element_size()
        num_bytes += size
        if size > storage.nbytes():
            raise ValueError(f"{name} repeats values instead of holding all of them")
    if num_bytes > sum(held.values()) and not may_share:
        raise ValueError("some weights share memory, which those of a model do not")


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Check that weights are finite.

    Raises:
        ValueError: If some are NaN or infinite.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not (finite := value.isfinite()).all():
            number = value.numel() - int(finite.sum())
            raise ValueError(
                f"{name} holds {number:,} NaN or infinite of {value.numel():,} values: the "
                "training has diverged; choose an earlier checkpoint, or pass "
                "allow_nonfinite=True to load it regardless"
            )


def _kind(value: Tensor) -> str:
    if value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return "float"
    is_other = value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    return str(value.dtype) if is_other else "integer"


def outline_of(kind: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Build a model on the meta device.

    Raises:
        ValueError: If it cannot be built.
    """
    try:
        with torch.device("meta"):
            return kind(**arguments)
    except (RuntimeError, TypeError, OverflowError) as error:  # including sizes beyond all memory
        reason = " ".join(str(error).split())
        raise ValueError(f"the model cannot be built ({reason})") from error


def build_from_weights(
    kind: type[nn.Module],
    arguments: Mapping[str, Any],
    weights: Mapping[str, Any],
    *,
    has_foreign: bool = False,
    allow_nonfinite: bool = False,
) -> nn.Module:
    """Build a model and load its weights, after checking them against a model on the meta device.

    Args:
        kind: Class of the model.
        arguments: Constructor arguments.
        weights: State dict.
        has_foreign: Whether some arguments are custom, with modules that may need memory.
        allow_nonfinite: Whether weights may be NaN or infinite.

    Raises:
        ValueError: If the weights do not belong to the model; or any error of the constructor
            and of ``load_state_dict``.
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

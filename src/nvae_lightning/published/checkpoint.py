"""Checkpoints of the published code."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nvae_lightning.model import NVAE
from nvae_lightning.published.names import published_duplicates, published_names
from nvae_lightning.published.settings import PublishedSettings
from nvae_lightning.serialization.checkpoints import read_torch_file
from nvae_lightning.serialization.weights import (
    build_from_weights,
    check_sizes,
    check_tensors,
    outline_of,
)
from nvae_lightning.utilities.plain_data import shown

_MOST_LISTED = 20


def load_published(path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> NVAE:
    """Read a published checkpoint, in evaluation mode and with the published numerics.

    Args:
        path: Checkpoint file.
        allow_nonfinite: Whether weights may be NaN or infinite.

    Raises:
        ValueError: If the file is not a published checkpoint, is damaged or asks for code to be
            run, or if its settings or weights do not match a model.
    """
    return build_checkpoint(path, read_torch_file(path), allow_nonfinite=allow_nonfinite)


def build_checkpoint(
    path: str | os.PathLike[str], content: object, *, allow_nonfinite: bool = False
) -> NVAE:
    """Build the model from the content of a published checkpoint; see :func:`load_published`.

    Args:
        path: File that it was read from, for messages.
        content: Content of the file.
        allow_nonfinite: Whether weights may be NaN or infinite.
    """
    try:
        settings, published = _parts(content)
        arguments = PublishedSettings.of(settings).arguments
        check_sizes(arguments, len(published))
        outline = outline_of(NVAE, arguments)
        assert isinstance(outline, NVAE)
        weights = _own_weights(outline, published)
        model = build_from_weights(NVAE, arguments, weights, allow_nonfinite=allow_nonfinite)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    assert isinstance(model, NVAE)
    return model.eval()


def _parts(content: object) -> tuple[Namespace | dict[str, object], dict[str, Tensor]]:
    """Return the settings and the weights of a published checkpoint.

    Raises:
        ValueError: If it is something else.
    """
    found = content if isinstance(content, dict) else {}
    args, weights = found.get("args"), found.get("state_dict")
    if not isinstance(args, Namespace | dict) or not isinstance(weights, dict):
        raise ValueError(
            "it does not hold the settings ('args') and weights ('state_dict') of a published "
            "checkpoint; give the whole checkpoint"
        )
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its state_dict has no tensor at {shown(name)}; give another file")
    return args, weights


def _listed(texts: Sequence[str], separator: str = ", ") -> str:
    """List the first of many."""
    more = [f"{len(texts) - _MOST_LISTED:,} more"] if len(texts) > _MOST_LISTED else []
    return separator.join([*texts[:_MOST_LISTED], *more])


def _own_weights(model: NVAE, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published weights to the names in this package's model.

    Raises:
        ValueError: If any is missing, unknown or has the wrong shape.
    """
    names, duplicates = published_names(model), published_duplicates(model)
    own = model.state_dict()
    known = set(names.values())
    # These counts have no effect, because the running statistics move by a fixed fraction.
    optional = {name for name in known if name.endswith(".num_batches_tracked")}
    shapes = {published: own[name].shape for name, published in names.items()}
    shapes.update({second: shapes[first] for second, first in duplicates.items()})
    check_tensors(weights, {p: own[name] for name, p in names.items()}, may_share=True)

    faults = []
    if missing := known - optional - weights.keys():
        faults.append(f"missing are {_listed(sorted(missing))}")
    if unknown := weights.keys() - shapes.keys():
        faults.append(f"unknown are {_listed(sorted(unknown))}")
    faults += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(shapes[name])}"
        for name in sorted(shapes.keys() & weights.keys())
        if weights[name].shape != shapes[name]
    ]
    faults += [
        f"{second} differs from {first}"
        for second, first in duplicates.items()
        if second in weights and first in weights
        if not torch.equal(weights[second], weights[first])
    ]
    if faults:
        raise ValueError(
            f"the weights do not belong to a model of these settings: {_listed(faults, '; ')}: "
            "use the settings ('args') that the weights were trained with"
        )
    return {
        name: weights.get(published, torch.zeros((), dtype=torch.int64))
        for name, published in names.items()
    }

"""Names of weights from before cells were sequences of units.

A cell's body was a flat sequence: for each unit its normalisation, with the activation inside it,
an upsampling if there was one, and its convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nvae_lightning.model.layers import NormActConv


def rename_weights(body: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename the earlier weights of a cell's body in place; keep current names.

    Args:
        body: Body of the cell that the weights are loaded into.
        state_dict: Weights by name.
        prefix: Prefix of the names of the body's weights.
    """
    names = [name for name in state_dict if name.startswith(prefix)]
    if any(".convolution." in name.removeprefix(prefix[:-1]) for name in names):
        return
    values = {name: state_dict.pop(name) for name in names}
    for now, earlier in _paths(body):
        for name in list(values):
            if name.startswith(f"{prefix}{earlier}."):
                leaf = name.removeprefix(f"{prefix}{earlier}.")
                state_dict[f"{prefix}{now}.{leaf}"] = values.pop(name)
    state_dict.update(values)  # unknown weights keep their names for the error message


def _paths(body: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the current and the earlier path of each layer of a body."""
    place = 0
    for index, layer in body.named_children():
        if not isinstance(layer, NormActConv):
            yield index, f"{place}"
            place += 1
            continue
        is_plain = isinstance(layer.activation, nn.Identity)
        yield f"{index}.norm", f"{place}" if is_plain else f"{place}.norm"
        place += 1
        if isinstance(layer.convolution, nn.Sequential):
            for step, _ in layer.convolution.named_children():
                yield f"{index}.convolution.{step}", f"{place}"
                place += 1
        else:
            yield f"{index}.convolution", f"{place}"
            place += 1

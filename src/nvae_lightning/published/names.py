"""Published names of weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nvae_lightning.model import NVAE, DepthwiseCell, RegularCell
from nvae_lightning.model.cells import ResidualCell
from nvae_lightning.model.decoder import ConditionalGroup, LatentGroup
from nvae_lightning.model.flows import AutoregressiveFlow
from nvae_lightning.model.layers import (
    NormActConv,
    SkipDown,
    SkipUp,
    SqueezeExcitation,
    WeightNormConv2d,
)

_Named = Iterator[tuple[nn.Module, str]]


def published_names(model: NVAE) -> dict[str, str]:
    """Map each name of the model's state dict to the published name of the same tensor.

    Raises:
        ValueError: If the model has cells that no published model has.
    """
    ours = {module: name for name, module in model.named_modules()}
    names = {"decoder.initial_state": "prior_ftr0"}
    for module, path in _named_modules(model):
        for leaf in module.state_dict():
            published = "log_weight_norm" if leaf == "log_gain" else leaf
            names[f"{ours[module]}.{leaf}"] = f"{path}.{published}"
    if unnamed := model.state_dict().keys() - names.keys():
        raise ValueError(f"no published model has {', '.join(sorted(unnamed))}")
    return names


def _named_modules(model: NVAE) -> _Named:
    """Yield every module with weights, and its published name."""
    encoder, decoder = model.encoder, model.decoder
    groups = [group for group in decoder.groups if isinstance(group, LatentGroup)]
    yield encoder.stem, "stem"
    for index, cell in enumerate(encoder.preprocess):
        yield from _cell(cell, f"pre_process.{index}")

    # Towers are numbered in the order of computation, including combiners.
    number = 0
    for tower, group in zip(encoder.groups, reversed(groups), strict=True):
        assert isinstance(tower, nn.Sequential)
        for cell in tower:
            yield from _cell(cell, f"enc_tower.{number}")
            number += 1
        if isinstance(group, ConditionalGroup):
            yield group.merge.convolution, f"enc_tower.{number}.conv"
            number += 1
    yield encoder.top[1], "enc0.1"

    number = 0
    for index, group in enumerate(groups):
        yield group.get_submodule("posterior"), f"enc_sampler.{index}"
        if isinstance(group, ConditionalGroup):
            yield group.prior[1], f"dec_sampler.{index - 1}.1"
            assert isinstance(group.cells, nn.Sequential)
            for cell in group.cells:
                yield from _cell(cell, f"dec_tower.{number}")
                number += 1
        yield group.combine.convolution, f"dec_tower.{number}.conv"
        number += 1
        for pair_index, pair in enumerate(group.flows, start=index * len(group.flows)):
            assert isinstance(pair, nn.Sequential)
            for step_index, step in enumerate(pair, start=1):
                assert isinstance(step, AutoregressiveFlow)
                path = f"nf_cells.{pair_index}.cell{step_index}"
                yield step.expand, f"{path}.conv.convz.0"
                yield step.mix, f"{path}.conv.convz.2"
                yield step.project, f"{path}.mu.conv_0"

    for index, cell in enumerate(decoder.postprocess):
        yield from _cell(cell, f"post_process.{index}")
    yield decoder.head[1], "image_conditional.1"


def _cell(cell: nn.Module, path: str) -> _Named:
    assert isinstance(cell, ResidualCell)
    if isinstance(cell.skip, SkipDown):
        for index, part in enumerate(cell.skip.parts, start=1):
            yield part, f"{path}.skip.conv_{index}"
    elif isinstance(cell.skip, SkipUp):
        yield cell.skip.convolution, f"{path}.skip.1"
    if isinstance(cell, RegularCell):
        yield from _regular_body(cell.body, f"{path}._ops")
    elif isinstance(cell, DepthwiseCell):
        yield from _depthwise_body(cell.body, f"{path}._ops.0.conv")
    if isinstance(cell.gate, SqueezeExcitation):
        yield cell.gate.squeeze, f"{path}.se.se.0"
        yield cell.gate.excite, f"{path}.se.se.2"


def _regular_body(body: nn.Module, path: str) -> _Named:
    """Name the units, each of which is a node."""
    for node, unit in enumerate(body.children()):
        assert isinstance(unit, NormActConv)
        if not isinstance(unit.norm, nn.Identity):
            name = "bn_act" if isinstance(unit.activation, nn.SiLU) else "bn.bn"
            yield unit.norm, f"{path}.{node}.{name}"
        convolution = unit.convolution
        if isinstance(convolution, nn.Sequential):  # after an upsampling
            convolution = convolution[-1]
        yield convolution, f"{path}.{node}.conv_0"


def _depthwise_body(body: nn.Module, path: str) -> _Named:
    """Name the steps; the upsampling of an up cell counts as one, which shifts the others."""
    *upsampling, expand, middle, project, last = body.children()
    assert isinstance(expand, NormActConv)
    assert isinstance(middle, NormActConv)
    assert isinstance(project, NormActConv)
    step = len(upsampling)
    yield expand.norm, f"{path}.{step}.bn"
    yield expand.convolution, f"{path}.{step + 1}.conv.0"
    yield middle.norm, f"{path}.{step + 1}.conv.1"
    yield middle.convolution, f"{path}.{step + 2}.conv.0"
    yield project.norm, f"{path}.{step + 2}.conv.1"
    yield project.convolution, f"{path}.{step + 3}"
    yield last, f"{path}.{step + 4}.bn"


def published_duplicates(model: NVAE) -> dict[str, str]:
    """Return second names of tensors that a file may contain twice, and their first names.

    The weight of a convolution without weight normalisation may also be there as
    ``weight_normalized``.
    """
    return {
        f"{path}.weight_normalized": f"{path}.weight"
        for module, path in _named_modules(model)
        if isinstance(module, nn.Conv2d) and not isinstance(module, WeightNormConv2d)
    }

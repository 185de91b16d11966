"""Weights trained by the published code, read into a model of ours.

A published checkpoint is what ``torch.save`` makes of a dict with the weights (``state_dict``) and
the settings of the training (``args``, an ``argparse.Namespace``). Only tensors, plain containers
and that namespace are read: a pickle that asks for anything else is refused, and nothing of it is
run.

Converted models keep the numerics that their weights were trained with and their published
figures computed with. Where these are not the correct ones, each has an option, which is off in
models of our own:

* ``first_prior_std=1.01`` of :class:`~nvae_lightning.model.NVAE`: the coarsest group's prior is
  N(0, 1.01²), as the bound on standard deviations was applied to it, too;
* ``published_tails=True`` of
  :class:`~nvae_lightning.model.DiscretizedLogisticMixtureLikelihood`: level 254 of 8 bits has the
  upper tail's probability as well as level 255;
* ``published_temperature=True``, there: sampling divides the logistics' scale by the temperature.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvae_lightning.model import (
    NVAE,
    BernoulliLikelihood,
    DepthwiseCell,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    NormalLikelihood,
    RegularCell,
)
from nvae_lightning.model.architecture import ARCHITECTURE
from nvae_lightning.model.cells import CellConstructor, ResidualCell
from nvae_lightning.model.decoder import ConditionalGroup, LatentGroup
from nvae_lightning.model.flows import AutoregressiveFlow
from nvae_lightning.model.layers import (
    NormActConv,
    SkipDown,
    SkipUp,
    SqueezeExcitation,
    WeightNormConv2d,
)
from nvae_lightning.model.weights import (
    build_of_weights,
    check_sizes,
    check_tensors,
    outline_of,
)
from nvae_lightning.objective import SpectralPenalty
from nvae_lightning.utilities.archive import check_stored, damage, is_archive, why_unreadable
from nvae_lightning.utilities.plain_data import check_file, shown

FilePath = str | os.PathLike[str]

#: Standard deviation of the coarsest group's prior: exp(0) + 0.01, as of any other group.
FIRST_PRIOR_STD = 1.01


# ------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class _Cells:
    """The constructors behind the name of an architecture."""

    preprocess: CellConstructor
    encoder: CellConstructor
    decoder: CellConstructor
    postprocess: CellConstructor


def _one_cell(cell: CellConstructor) -> _Cells:
    return _Cells(cell, cell, cell, cell)


def _depthwise_decoder(cell: CellConstructor) -> _Cells:
    return _Cells(cell, cell, DepthwiseCell, _DEPTHWISE_3)


_DEPTHWISE_3 = partial(DepthwiseCell, expansion=3)
_GROUPS_OF_8 = partial(DepthwiseCell, expansion=3, num_groups=8)
_DEPTHWISE_11 = partial(DepthwiseCell, kernel_size=11)

_ARCHITECTURES = {
    "res_mbconv": _depthwise_decoder(RegularCell),
    "res53_mbconv": _depthwise_decoder(partial(RegularCell, dilations=(2, 1))),
    "res35_mbconv": _depthwise_decoder(partial(RegularCell, dilations=(1, 2))),
    "res55_mbconv": _depthwise_decoder(partial(RegularCell, dilations=(2, 2))),
    "res_bnswish": _one_cell(RegularCell),
    "res_bnelu": _one_cell(partial(RegularCell, activation=nn.ELU)),
    "res_elu": _one_cell(partial(RegularCell, normalization=nn.Identity, activation=nn.ELU)),
    "mbconv_sep": _Cells(_DEPTHWISE_3, DepthwiseCell, DepthwiseCell, _DEPTHWISE_3),
    "mbconv_sep11": _Cells(_DEPTHWISE_3, _DEPTHWISE_11, _DEPTHWISE_11, _DEPTHWISE_3),
    "mbconv_den": _Cells(_GROUPS_OF_8, DepthwiseCell, DepthwiseCell, _GROUPS_OF_8),
    "mbconv_res": _Cells(_DEPTHWISE_3, DepthwiseCell, RegularCell, RegularCell),
}

_BINARY_DATASETS = ("mnist", "omniglot")
_SIZES = {"cifar10": 32, "ffhq": 256}
_MAY_BE_0 = ("num_nf", "num_preprocess_blocks", "num_postprocess_blocks")
_HALVINGS = ("num_latent_scales", "num_preprocess_blocks", "num_postprocess_blocks")
_MOST_HALVINGS = 30
_MOST_LISTED = 20


@dataclass(frozen=True)
class PublishedSettings:
    """Those settings of the published code that a model depends on, by their published names.

    Older checkpoints lack a few. Only such have a default as the shapes of the weights confirm.

    Args:
        dataset: what the model was trained on; it decides the size of the images alone, and
            whether they are binary.
        arch_instance: which cells the model is made of.
        num_x_bits: bits per pixel channel of images that are not binary.
        num_latent_scales: number of scales.
        num_groups_per_scale: number of groups of the finest scale.
        num_latent_per_group: channels of a latent group.
        num_channels_enc: channels of the encoder at full resolution.
        num_channels_dec: channels of the decoder at full resolution.
        num_preprocess_blocks: halvings of the resolution before the finest scale.
        num_preprocess_cells: cells of each of them.
        num_postprocess_blocks: doublings of the resolution after the finest scale.
        num_postprocess_cells: cells of each of them.
        num_cell_per_cond_enc: bottom-up cells per group.
        num_cell_per_cond_dec: top-down cells per group.
        num_nf: pairs of flows per group.
        use_se: whether cells end in a channel-wise gate.
        res_dist: whether posteriors are relative to their priors.
        ada_groups: whether each coarser scale has half as many groups.
        min_groups_per_scale: the least number of groups of such a coarser scale.
        num_mixture_dec: components of the likelihood's mixture; 1 is a normal distribution.

    Raises:
        ValueError: if a setting is out of range.
    """

    dataset: str
    arch_instance: str
    num_x_bits: int
    num_latent_scales: int
    num_groups_per_scale: int
    num_latent_per_group: int
    num_channels_enc: int
    num_channels_dec: int
    num_preprocess_blocks: int
    num_preprocess_cells: int
    num_postprocess_blocks: int
    num_postprocess_cells: int
    num_cell_per_cond_enc: int
    num_cell_per_cond_dec: int
    num_nf: int
    use_se: bool
    res_dist: bool
    ada_groups: bool = False
    min_groups_per_scale: int = 1
    num_mixture_dec: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_0 else 1
            if field.type == "int" and value < least:
                raise ValueError(
                    f"published setting {field.name} must be at least {least}, got {shown(value)}"
                )
            if field.name in _HALVINGS and value > _MOST_HALVINGS:
                raise ValueError(
                    f"published setting {field.name} must be at most {_MOST_HALVINGS}, as each "
                    f"halves the image's side, got {shown(value)}"
                )
        if self.arch_instance not in _ARCHITECTURES:
            raise ValueError(
                f"published setting arch_instance names an unknown architecture "
                f"{shown(self.arch_instance)}; known are {', '.join(sorted(_ARCHITECTURES))}"
            )
        if self.num_preprocess_blocks != self.num_postprocess_blocks:
            raise ValueError(
                "published settings num_preprocess_blocks and num_postprocess_blocks must be "
                f"equal, as the latents lie between them, got {self.num_preprocess_blocks} and "
                f"{self.num_postprocess_blocks}"
            )

    @classmethod
    def of(cls, settings: Mapping[str, object] | Namespace) -> PublishedSettings:
        """Pick from all the settings of a training.

        Raises:
            ValueError: if one is missing, of the wrong type or out of range.
        """
        given = vars(settings) if isinstance(settings, Namespace) else settings
        wanted = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := [name for name in wanted if name not in given]:
            raise ValueError(
                f"published settings lack {', '.join(missing)}: add what the weights were "
                "trained with"
            )
        known: dict[str, Any] = {f.name: given[f.name] for f in fields(cls) if f.name in given}
        for field in fields(cls):
            kind = {"str": str, "int": int, "bool": bool}[str(field.type)]
            if type(value := known.get(field.name, field.default)) is not kind:
                raise ValueError(
                    f"published setting {field.name} must be of type {field.type}, "
                    f"got {shown(value)}"
                )
        return cls(**known)

    @property
    def image(self) -> Image:
        """What the model is about; ValueError if the dataset is unknown."""
        if self.dataset in _BINARY_DATASETS:
            return Image(channels=1, size=28, bits=1, padding=2)
        trailing = re.search(r"_(\d+)$", self.dataset)
        size = int(trailing[1]) if trailing else _SIZES.get(self.dataset)
        if size is None:
            raise ValueError(
                f"published setting dataset names an unknown dataset {shown(self.dataset)}; "
                f"known are {', '.join((*_BINARY_DATASETS, *_SIZES))} and names that end in the "
                "side of the images, as celeba_64"
            )
        return Image(channels=3, size=size, bits=self.num_x_bits)

    @property
    def num_groups(self) -> list[int]:
        """Number of groups per scale, coarsest first."""
        counts = [self.num_groups_per_scale]
        while len(counts) < self.num_latent_scales:
            halved = max(self.min_groups_per_scale, counts[-1] // 2)
            counts.append(halved if self.ada_groups else counts[-1])
        return counts[::-1]


def build_published(settings: Mapping[str, object] | Namespace | PublishedSettings) -> NVAE:
    """Build the model that published settings describe, with the published numerics.

    Args:
        settings: by their published names; those that a model does not depend on are ignored.

    Raises:
        ValueError: if a setting is missing, unknown or out of range.
    """
    if not isinstance(settings, PublishedSettings):
        settings = PublishedSettings.of(settings)
    return NVAE(**_arguments(settings))


def _arguments(settings: PublishedSettings) -> dict[str, Any]:
    """Give the constructor arguments of the model that published settings describe."""
    image, cells = settings.image, _ARCHITECTURES[settings.arch_instance]
    if settings.dataset in _BINARY_DATASETS:
        likelihood = BernoulliLikelihood
    elif settings.num_mixture_dec == 1:
        likelihood = NormalLikelihood
    else:
        likelihood = partial(
            DiscretizedLogisticMixtureLikelihood,
            num_mixtures=settings.num_mixture_dec,
            published_tails=True,
            published_temperature=True,
        )
    return dict(
        image=image,
        hierarchy=Hierarchy.doubling(
            channels=settings.num_channels_enc,
            decoder_channels=settings.num_channels_dec,
            num_groups=settings.num_groups,
            downsample=2**settings.num_preprocess_blocks,
            latent_channels=settings.num_latent_per_group,
        ),
        encoder_cell=cells.encoder,
        decoder_cell=cells.decoder,
        preprocess_cell=cells.preprocess,
        postprocess_cell=cells.postprocess,
        likelihood=likelihood,
        num_encoder_cells=settings.num_cell_per_cond_enc,
        num_decoder_cells=settings.num_cell_per_cond_dec,
        num_preprocess_cells=settings.num_preprocess_cells,
        num_postprocess_cells=settings.num_postprocess_cells,
        num_flows=settings.num_nf,
        squeeze_excitation=settings.use_se,
        residual_posterior=settings.res_dist,
        first_prior_std=FIRST_PRIOR_STD,
    )


# ---------------------------------------------------------------------------------------- names

_Named = Iterator[tuple[nn.Module, str]]


def published_names(model: NVAE) -> dict[str, str]:
    """Map each name of the model's state dict to the published name of the same tensor.

    Raises:
        ValueError: if the model has cells that no published model has.
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
    """Every module that holds weights, with its published name."""
    encoder, decoder = model.encoder, model.decoder
    groups = [group for group in decoder.groups if isinstance(group, LatentGroup)]
    yield encoder.stem, "stem"
    for index, cell in enumerate(encoder.preprocess):
        yield from _cell(cell, f"pre_process.{index}")

    # Towers are numbered through in the order of computation, combiners included.
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
        if isinstance(convolution, nn.Sequential):  # behind an upsampling
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
    """Published names that a file may have twice: the second name, and the one it repeats.

    The weight of a convolution without weight normalisation may be there as
    ``weight_normalized``, too.
    """
    return {
        f"{path}.weight_normalized": f"{path}.weight"
        for module, path in _named_modules(model)
        if isinstance(module, nn.Conv2d) and not isinstance(module, WeightNormConv2d)
    }


# -------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What we take from a published checkpoint.

    Args:
        settings: what its model depends on.
        weights: tensors by their published names.
    """

    settings: PublishedSettings
    weights: dict[str, Tensor]

    def build(self, *, allow_nonfinite: bool = False) -> NVAE:
        """Build the model with its weights, in evaluation mode.

        Args:
            allow_nonfinite: whether weights may be NaN or infinite.

        Raises:
            ValueError: if the weights are not those of such a model.
        """
        arguments = _arguments(self.settings)
        check_sizes(arguments, len(self.weights))
        outline = outline_of(NVAE, arguments)
        assert isinstance(outline, NVAE)
        weights = _own_weights(outline, self.weights)
        model = build_of_weights(NVAE, arguments, weights, allow_nonfinite=allow_nonfinite)
        assert isinstance(model, NVAE)
        return model.eval()


def load_published(path: FilePath) -> NVAE:
    """Read a published checkpoint into a model of ours, in evaluation mode.

    The model keeps the published numerics, as this module's documentation lists them.

    Args:
        path: the checkpoint file.

    Raises:
        ValueError: if the file is no published checkpoint, is damaged or asks for code to be
            run, if its settings describe no model, or if its weights are not that model's.
    """
    return build_checkpoint(path, read_content(path))


def build_checkpoint(path: FilePath, content: object, *, allow_nonfinite: bool = False) -> NVAE:
    """As :func:`load_published`, of a file that has been read.

    Raises:
        ValueError: as there.
    """
    checkpoint = _checkpoint(path, content)
    with _naming(path):
        return checkpoint.build(allow_nonfinite=allow_nonfinite)


def read_published(path: FilePath) -> PublishedCheckpoint:
    """Read settings and weights of a published checkpoint.

    Args:
        path: the checkpoint file.

    Raises:
        ValueError: if the file is no published checkpoint, is damaged or asks for code to be
            run, or if its settings describe no model.
    """
    return _checkpoint(path, read_content(path))


def read_content(path: FilePath) -> object:
    """Read what ``torch.save`` wrote: tensors, plain containers and ``argparse.Namespace``.

    Raises:
        ValueError: if the file is none of that, is damaged or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' is not a file: give a checkpoint")
    try:
        check_file(path)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    try:
        if is_archive(path):
            check_stored(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # torch's remarks on files of older versions
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"'{path}' {why_unreadable(path, error)}") from error
    if is_archive(path):  # torch compares no checksums; older formats have none
        if (damaged := damage(path)) is not None:
            raise ValueError(
                f"'{path}' is damaged, its checksums are wrong ({damaged}): give another one"
            )
    return content


def _checkpoint(path: FilePath, content: Any) -> PublishedCheckpoint:  # noqa: ANN401
    if (found := _why_not_published(content)) is not None:
        raise ValueError(f"'{path}' {found}")
    with _naming(path):
        settings = PublishedSettings.of(content["args"])
    return PublishedCheckpoint(settings, dict(content["state_dict"]))


@contextmanager
def _naming(path: FilePath) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error


def _why_not_published(content: object) -> str | None:
    """Say what was found instead of a published checkpoint; None if it is one."""
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__}, not a checkpoint: give a published checkpoint"
    if "pytorch-lightning_version" in content:
        return (
            "is a Lightning checkpoint, not a published one: training goes on from it by ckpt_path"
        )
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return "holds weights without the settings ('args') they need: give the whole checkpoint"
    if missing := [name for name in ("state_dict", "args") if name not in content]:
        return f"lacks {' and '.join(missing)}: give a published checkpoint"
    args, weights = content["args"], content["state_dict"]
    if not isinstance(args, Namespace | dict):
        return f"has args of type {type(args).__name__}, not argparse.Namespace: give another file"
    if not isinstance(weights, dict):
        return f"has a state_dict of type {type(weights).__name__}, not dict: give another file"
    others = [
        str(name)
        for name, value in weights.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if others:
        return f"has no tensors as {', '.join(others)} of state_dict: give another file"
    return None


def _listed(texts: Sequence[str], separator: str = ", ") -> str:
    """List the first of many."""
    more = [f"{len(texts) - _MOST_LISTED:,} more"] if len(texts) > _MOST_LISTED else []
    return separator.join([*texts[:_MOST_LISTED], *more])


def _own_weights(model: NVAE, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give published weights their names in a model of ours.

    Raises:
        ValueError: if any is missing, unknown or misshapen.
    """
    names, duplicates = published_names(model), published_duplicates(model)
    own = model.state_dict()
    known = set(names.values())
    # A count that nothing depends on, as the running statistics move by a fixed fraction.
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
        f"{second} is not the same as {first}"
        for second, first in duplicates.items()
        if second in weights and first in weights
        if not torch.equal(weights[second], weights[first])
    ]
    if faults:
        raise ValueError(
            f"the weights are not those of a model of these settings: {_listed(faults, '; ')}: "
            "use the settings ('args') that the weights were trained with"
        )
    return {
        name: weights.get(published, torch.zeros((), dtype=torch.int64))
        for name, published in names.items()
    }


# -------------------------------------------------------------------------------------- folders


def convert_published(
    path: FilePath,
    folder: FilePath,
    *,
    lightning_checkpoint: bool = False,
    allow_nonfinite: bool = False,
) -> NVAE:
    """Write a published checkpoint's model as :meth:`NVAE.from_pretrained` reads it.

    Args:
        path: the checkpoint file.
        folder: new or empty; it gets all of its files at once, or none.
        lightning_checkpoint: whether it also gets ``last.ckpt``, from which a training by
            :class:`NVAEModule` can begin: its weights are the published
            ones; its steps, learning rate and optimiser start anew.
        allow_nonfinite: whether weights may be NaN or infinite.

    Returns:
        The model.

    Raises:
        ValueError: if the folder is not empty, or the checkpoint cannot be read.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"'{folder}' is there already and not empty: name another folder")
    checkpoint = read_published(path)
    with _naming(path):
        model = checkpoint.build(allow_nonfinite=allow_nonfinite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        files = Path(temporary) / "files"
        model.save_pretrained(files)
        if lightning_checkpoint:
            torch.save(_lightning_checkpoint(model), files / "last.ckpt")
        if folder.exists():
            folder.rmdir()
        files.rename(folder)
    return model


def _lightning_checkpoint(model: NVAE) -> dict[str, object]:
    modules = {"model": model, "spectral_penalty": SpectralPenalty(model)}
    return {
        "pytorch-lightning_version": version("lightning"),
        ARCHITECTURE: model.architecture,
        "epoch": 0,
        "global_step": 0,
        "state_dict": {
            f"{prefix}.{name}": value
            for prefix, module in modules.items()
            for name, value in module.state_dict().items()
        },
        "optimizer_states": [],
        "lr_schedulers": [],
    }

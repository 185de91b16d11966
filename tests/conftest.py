"""Fixtures of all tests: a fixed seed, one thread, and tiny models."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from warm_python import run_python

if not torch.cuda.is_available():
    # Without a GPU, Triton's interpreter runs the kernels; Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from nvae_lightning.model import (
    NVAE,
    BernoulliLikelihood,
    DepthwiseCell,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    RegularCell,
)
from nvae_lightning.model.layers import DataDependentConv2d
from nvae_lightning.model.normalization import BatchNorm

BuildNVAE = Callable[..., NVAE]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # For tensors this small, a second thread costs up to a hundred times more than it gains.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def written_by_this_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with the output of the test file run as a script in a separate process."""
    place = tmp_path_factory.mktemp("ranks")
    result = run_python(str(request.path), str(place), cwd=place)
    assert result.returncode == 0, result.stderr
    return place


@pytest.fixture
def build_nvae() -> BuildNVAE:
    """Constructor of tiny models, given arguments of NVAE to replace."""

    def build(image: Image | None = None, **overrides: Any) -> NVAE:
        image = Image(channels=3, size=8, bits=8) if image is None else image
        arguments: dict[str, Any] = {
            "hierarchy": Hierarchy.doubling(
                channels=4, num_groups=[1, 2], downsample=2, latent_channels=2
            ),
            "encoder_cell": RegularCell,
            "decoder_cell": partial(DepthwiseCell, expansion=2.0),
            "preprocess_cell": RegularCell,
            "postprocess_cell": partial(DepthwiseCell, expansion=2.0),
            "likelihood": partial(DiscretizedLogisticMixtureLikelihood, num_mixtures=2),
            "num_encoder_cells": 1,
            "num_decoder_cells": 1,
            "num_preprocess_cells": 1,
            "num_postprocess_cells": 1,
        }
        return NVAE(image, **{**arguments, **overrides})

    return build


CELLS: dict[str, Callable[..., nn.Module]] = {
    "regular": RegularCell,
    "dilated": partial(RegularCell, dilations=(2, 1)),
    "one dilated": partial(RegularCell, dilations=(4,)),
    "batch-norm ELU": partial(RegularCell, activation=nn.ELU),
    "weight-norm ELU": partial(
        RegularCell,
        normalization=nn.Identity,
        activation=nn.ELU,
        convolution=DataDependentConv2d,
    ),
    "depthwise": partial(DepthwiseCell, expansion=2.0),
    "depthwise 3x3": partial(DepthwiseCell, expansion=3.0, kernel_size=3),
    "grouped": partial(DepthwiseCell, expansion=2.0, num_groups=2),
}


@pytest.fixture(params=CELLS.values(), ids=list(CELLS))
def build_cell(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """Constructor of each kind of cell in turn."""
    return request.param


def _in_use(model: NVAE) -> NVAE:
    """Randomise the batch-norm statistics and switch to evaluation mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def colour_nvae(build_nvae: BuildNVAE) -> NVAE:
    """Two scales, three groups, 8-bit colour, no flows."""
    return _in_use(build_nvae())


@pytest.fixture
def flow_nvae(build_nvae: BuildNVAE) -> NVAE:
    """Like colour_nvae, with a pair of flows per group."""
    return _in_use(build_nvae(num_flows=1))


@pytest.fixture
def grey_nvae(build_nvae: BuildNVAE) -> NVAE:
    """Binary images of 6x6 pixels, padded to 8x8."""
    image = Image(channels=1, size=6, bits=1, padding=1)
    return _in_use(build_nvae(image, likelihood=BernoulliLikelihood))


@pytest.fixture(params=["colour_nvae", "flow_nvae", "grey_nvae"])
def nvae(request: pytest.FixtureRequest) -> NVAE:
    """Each of the three tiny models in turn."""
    return request.getfixturevalue(request.param)

"""Descriptions of models are plain data: they rebuild the same model and run no code."""

from __future__ import annotations

import copy
import enum
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import ListConfig
from torch import nn

from nvae_lightning.model import (
    NVAE,
    BernoulliLikelihood,
    DepthwiseCell,
    DiscretizedLogisticMixtureLikelihood,
    Hierarchy,
    Image,
    NormalLikelihood,
    RegularCell,
    Scale,
)
from nvae_lightning.model.layers import DataDependentConv2d, WeightNormConv2d
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.serialization.architecture import describe, restore
from nvae_lightning.serialization.weights import build

with warnings.catch_warnings():  # beartype's, of omegaconf's DictConfig
    warnings.simplefilter("ignore", DeprecationWarning)
    from nvae_lightning.cli.config_root import CONFIG_ROOT

BuildNVAE = Callable[..., NVAE]

CELLS: dict[str, Any] = {
    "regular": RegularCell,
    "regular_partial": partial(RegularCell),
    "batch_norm_elu": partial(RegularCell, activation=nn.ELU),
    "batch_norm_swish": partial(RegularCell, normalization=BatchNorm, activation=nn.SiLU),
    "elu": partial(RegularCell, normalization=nn.Identity, activation=nn.ELU),
    "weight_norm": partial(RegularCell, convolution=WeightNormConv2d),
    "plain": partial(RegularCell, convolution=nn.Conv2d),
    "data_dependent": partial(
        RegularCell,
        normalization=partial(nn.Identity),
        activation=nn.ELU,
        convolution=DataDependentConv2d,
    ),
    "nested": partial(
        RegularCell, convolution=partial(DataDependentConv2d, padding_mode="circular")
    ),
    "no_bias": partial(RegularCell, convolution=partial(WeightNormConv2d, bias=False)),
    "dilated": partial(RegularCell, dilations=(2, 1)),
    "one_convolution": partial(RegularCell, dilations=[1]),
    "depthwise": DepthwiseCell,
    "expansion": partial(DepthwiseCell, expansion=1.5),
    "kernel": partial(DepthwiseCell, expansion=2, kernel_size=3),
    "groups": partial(DepthwiseCell, expansion=2, num_groups=4),
    "depthwise_by_name": partial(DepthwiseCell, expansion=2, num_groups=None),
}
PLACES = ("encoder", "decoder", "preprocess", "postprocess")
GREY = Image(channels=1, size=6, bits=1, padding=1)
SETTINGS: dict[str, dict[str, Any]] = {
    "bernoulli": {"image": GREY, "likelihood": BernoulliLikelihood},
    "normal": {"likelihood": NormalLikelihood},
    "mixture": {"likelihood": DiscretizedLogisticMixtureLikelihood},
    "published_tails": {
        "likelihood": partial(
            DiscretizedLogisticMixtureLikelihood,
            num_mixtures=2,
            published_tails=True,
            published_temperature=True,
        )
    },
    "grey_mixture": {"image": Image(channels=1, size=10, bits=3, padding=3)},
    "one_flow": {"num_flows": 1},
    "two_flows": {"num_flows": 2},
    "wide_decoder": {
        "hierarchy": Hierarchy.doubling(
            channels=4, decoder_channels=5, num_groups=[1, 1], downsample=2, latent_channels=2
        )
    },
    "uneven": {
        "hierarchy": Hierarchy(
            (Scale(4, 12, 2, decoder_channels=7), Scale(2, 9, 1), Scale(1, 4, 1)),
            latent_channels=3,
        ),
        "num_decoder_cells": 2,
    },
    "more_cells": {
        "num_encoder_cells": 2,
        "num_decoder_cells": 3,
        "num_preprocess_cells": 2,
        "num_postprocess_cells": 3,
    },
    "no_gates": {"squeeze_excitation": False},
    "absolute_posterior": {"residual_posterior": False},
    "first_prior_std": {"first_prior_std": 1.01},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{
        name: dict.fromkeys([f"{place}_cell" for place in PLACES], cell)
        for name, cell in CELLS.items()
    },
    **SETTINGS,
}


def through_json(model: NVAE) -> dict[str, Any]:
    """Return the model's description after a round trip through JSON."""
    description = json.loads(json.dumps(model.architecture))
    assert description == model.architecture
    return description


@pytest.fixture(scope="module")
def described() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Description and weights of a model; tests copy what they change."""
    decoder_cell = partial(DepthwiseCell, expansion=2.0)
    model = NVAE(
        Image(channels=3, size=8, bits=8),
        Hierarchy.doubling(channels=4, num_groups=[1, 2], downsample=2, latent_channels=2),
        encoder_cell=RegularCell,
        decoder_cell=decoder_cell,
        preprocess_cell=RegularCell,
        postprocess_cell=decoder_cell,
        likelihood=partial(DiscretizedLogisticMixtureLikelihood, num_mixtures=2),
        num_encoder_cells=1,
        num_decoder_cells=1,
        num_preprocess_cells=1,
        num_postprocess_cells=1,
    )
    return through_json(model), dict(model.state_dict())


def shapes(model: NVAE) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_rebuilt_from_its_description(variant: str, build_nvae: BuildNVAE) -> None:
    model = build_nvae(**VARIANTS[variant]).eval()
    description = through_json(model)
    again = NVAE(**restore(description, {})).eval()
    assert (again.image, again.hierarchy) == (model.image, model.hierarchy)
    assert shapes(again) == shapes(model)
    assert through_json(again) == description
    # Settings without weights, such as dilations, activations and tails, show in the outputs.
    again.load_state_dict(model.state_dict())
    image = model.image
    x = torch.rand(2, image.channels, image.size, image.size).round()
    noise = [torch.randn(2, *shape) for shape in model.latent_shapes]
    with torch.no_grad():
        expected, found = (m(x, noise).log_weight(x) for m in (model, again))
        assert found.isfinite().all()
        assert torch.equal(found, expected)
        assert torch.equal(again.sample(2, 0.7, noise).mean, model.sample(2, 0.7, noise).mean)


def test_different_models_have_different_descriptions() -> None:
    descriptions = {name: json.dumps(describe(given)) for name, given in VARIANTS.items()}
    assert descriptions.pop("regular_partial") == descriptions["regular"]
    assert len(set(descriptions.values())) == len(descriptions)


def test_a_description_lists_the_settings_of_the_model() -> None:
    with torch.device("meta"):
        model = NVAE(
            GREY,
            Hierarchy((Scale(2, 8, 3, decoder_channels=6),), latent_channels=5),
            encoder_cell=partial(
                RegularCell, dilations=(2, 1), activation=nn.ELU, convolution=nn.Conv2d
            ),
            decoder_cell=partial(DepthwiseCell, expansion=3),
            preprocess_cell=RegularCell,
            postprocess_cell=DepthwiseCell,
            likelihood=BernoulliLikelihood,
            num_flows=1,
        )
    assert model.architecture == {
        "image": {"channels": 1, "size": 6, "bits": 1, "padding": 1},
        "hierarchy": {
            "scales": [{"downsample": 2, "channels": 8, "num_groups": 3, "decoder_channels": 6}],
            "latent_channels": 5,
        },
        "encoder_cell": {
            "constructor": "RegularCell",
            "dilations": [2, 1],
            "activation": {"constructor": "ELU"},
            "convolution": {"constructor": "Conv2d"},
        },
        "decoder_cell": {"constructor": "DepthwiseCell", "expansion": 3},
        "preprocess_cell": {"constructor": "RegularCell"},
        "postprocess_cell": {"constructor": "DepthwiseCell"},
        "likelihood": {"constructor": "BernoulliLikelihood"},
        "num_encoder_cells": 2,
        "num_decoder_cells": 2,
        "num_preprocess_cells": 2,
        "num_postprocess_cells": 2,
        "num_flows": 1,
        "squeeze_excitation": True,
        "residual_posterior": True,
        "first_prior_std": 1.0,
    }


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_ROOT / "conf" / group).glob("*.yaml"))


@pytest.fixture
def build_of_config() -> Iterator[Callable[..., NVAE]]:
    """Build the model of train.yaml with overrides, on the meta device."""

    def of_config(*overrides: str) -> NVAE:
        with torch.device("meta"):
            return instantiate(compose("train", list(overrides)).model, _convert_="all")

    with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
        yield of_config


LEAST = [
    "model.hierarchy.max_groups_per_scale=1",
    *(f"model.num_{place}_cells=1" for place in PLACES),
]
CONFIGURED = [
    # All models, and by default only a small one that differs from them in numbers alone.
    # `pretrained` has the architecture of other weights.
    *(
        pytest.param(model, [], marks=pytest.mark.slow, id=model)
        for model in options("model")
        if model != "pretrained"
    ),
    pytest.param("large", LEAST, id="large_least"),
]


@pytest.mark.parametrize(("model", "overrides"), CONFIGURED)
@pytest.mark.parametrize("dataset", options("dataset"))
def test_every_configured_model_is_rebuilt_from_its_description(
    build_of_config: Callable[..., NVAE], dataset: str, model: str, overrides: list[str]
) -> None:
    nvae = build_of_config(f"dataset={dataset}", f"model={model}", *overrides)
    description = through_json(nvae)
    with torch.device("meta"):
        again = NVAE(**restore(description, {}))
    assert len(shapes(nvae)) > 80
    assert shapes(again) == shapes(nvae)
    assert again.architecture == description


@pytest.mark.parametrize("cell", options("model/cell"))
def test_every_configured_cell_is_rebuilt_from_its_description(
    build_of_config: Callable[..., NVAE], cell: str
) -> None:
    nvae = build_of_config(*(f"model/cell@model.{place}_cell={cell}" for place in PLACES))
    with torch.device("meta"):
        again = NVAE(**restore(through_json(nvae), {}))
    assert [type(m) for m in again.modules()] == [type(m) for m in nvae.modules()]
    assert shapes(again) == shapes(nvae)


# ------------------------------------------------------------------------ foreign constructors


class OwnCell(RegularCell):
    """A cell from outside the package."""

    def __init__(self, *args: Any, options: object = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options


class Colour(str, enum.Enum):
    RED = "red"


def without_normalization(channels: int) -> nn.Module:
    del channels
    return nn.Identity()


NAMESAKE = type("RegularCell", (DepthwiseCell,), {"__module__": "elsewhere"})
OTHERS: dict[str, tuple[Any, str]] = {
    "class": (OwnCell, f"encoder_cell is '{OwnCell.__module__}.OwnCell'"),
    "partial": (partial(OwnCell, dilations=(1,)), "encoder_cell is .*OwnCell'"),
    "lambda": (lambda *args, **kwargs: OwnCell(*args, **kwargs), "encoder_cell is .*<lambda>'"),
    "namesake": (NAMESAKE, "encoder_cell is 'elsewhere.RegularCell'"),
    "nested_function": (
        partial(RegularCell, normalization=without_normalization),
        "encoder_cell.normalization is .*without_normalization'",
    ),
    "nested_lambda": (
        partial(RegularCell, normalization=lambda channels: nn.BatchNorm2d(channels)),
        "encoder_cell.normalization is .*<lambda>'",
    ),
    "of_torch": (
        partial(RegularCell, normalization=nn.BatchNorm2d),
        "encoder_cell.normalization is 'torch.nn.modules.batchnorm.BatchNorm2d'",
    ),
    "deeply_nested": (
        partial(RegularCell, convolution=partial(nn.Conv2d, dtype=torch.float32)),
        "encoder_cell.convolution.dtype is 'torch.dtype'",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_foreign_constructors_are_refused_unless_given(kind: str, build_nvae: BuildNVAE) -> None:
    cell, message = OTHERS[kind]
    model = build_nvae(encoder_cell=cell)
    description = through_json(model)
    with pytest.raises(
        ValueError, match=f"^{message}, which is not part of this package"
    ) as error:
        restore(description, {})
    assert "pass it as encoder_cell=CONSTRUCTOR" in str(error.value)
    again = NVAE(**restore(description, {"encoder_cell": cell}))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert shapes(again) == shapes(model)
    assert through_json(again) == description


def test_a_foreign_likelihood_is_refused_unless_given(build_nvae: BuildNVAE) -> None:
    def likelihood(image: Image) -> NormalLikelihood:
        return NormalLikelihood(image)

    description = through_json(build_nvae(likelihood=likelihood))
    with pytest.raises(ValueError, match=r"^likelihood is '.*likelihood', .*likelihood=CONSTR"):
        restore(description, {})
    again = NVAE(**restore(description, {"likelihood": likelihood}))
    assert isinstance(again.likelihood, NormalLikelihood)


def test_any_argument_may_be_given_instead(build_nvae: BuildNVAE) -> None:
    description = through_json(build_nvae())
    image, hierarchy = GREY, Hierarchy((Scale(2, 8, 1),), latent_channels=3)
    given = {"image": image, "hierarchy": hierarchy, "first_prior_std": 2.0}
    model = NVAE(**restore(description, {**given, "likelihood": BernoulliLikelihood}))
    assert (model.image, model.hierarchy) == (image, hierarchy)
    assert model.decoder.groups[0].prior_std == 2.0


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "eval",
        "harmful.Cell",
        "harmful",
        "nvae_lightning.model.cells.RegularCell",
        "nvae_lightning.train.main",
        "nn",
        "FeatureMap",
        "Linear",
        "regularcell",
        "RegularCell ",
        "",
        "__class__",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_unknown_names_are_not_looked_up_imported_or_run(
    nested: bool,
    name: str,
    described: tuple[dict[str, Any], dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "harmful.py").write_text("import pathlib\npathlib.Path('harm').mkdir()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    description = dict(described[0])
    foreign = {"constructor": name, "command": "mkdir harm"}
    inner = {"constructor": "RegularCell", "normalization": foreign}
    description["encoder_cell"] = inner if nested else foreign
    modules = set(sys.modules)
    with pytest.raises(ValueError, match="which is not part of this package"):
        restore(description, {})
    assert set(sys.modules) == modules
    assert [path.name for path in tmp_path.iterdir()] == ["harmful.py"]


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        enum.Enum("Kind", ["A"]).A,  # pyright: ignore[reportAttributeAccessIssue]
        torch.float16,
        torch.relu,
        torch.zeros(2),
        np.zeros(2),
        np.float64(1.5),
        np.int64(3),
        ListConfig([1, 2]),
        {"a": [Colour.RED, {"b": torch.float16}]},
        object(),
        nn.ReLU(),
        Image(1, 8, 1),
        Path("a"),
        b"ab",
    ],
    ids=lambda value: type(value).__name__,
)
def test_descriptions_are_plain_data_for_any_foreign_constructor(
    value: Any, build_nvae: BuildNVAE
) -> None:
    # Checkpoints contain the description and are only loaded if all of it is plain data.
    cell = partial(OwnCell, options=value)
    description = build_nvae(encoder_cell=cell).architecture
    assert json.loads(json.dumps(description)) == description
    file = io.BytesIO()
    torch.save(description, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == description
    with pytest.raises(ValueError, match="OwnCell"):
        restore(description, {})


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (partial(DepthwiseCell, expansion=np.float64(1.5)), {"expansion": 1.5}),
        (partial(DepthwiseCell, **{"kernel_size": np.int64(3)}), {"kernel_size": 3}),
        (partial(RegularCell, dilations=ListConfig([2, 1])), {"dilations": [2, 1]}),
        (partial(RegularCell, dilations=range(1, 3)), {"dilations": [1, 2]}),
    ],
    ids=["float64", "int64", "ListConfig", "range"],
)
def test_numbers_and_lists_of_other_libraries_become_plain_data(
    cell: Any, expected: dict[str, Any]
) -> None:
    described = describe({"cell": cell})["cell"]
    assert described == {"constructor": cell.func.__name__, **expected}
    for value in described.values():
        assert type(value) in (str, int, float, list)


# ------------------------------------------------------------------------------- malformed data


def changed(description: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Copy with `value` at `path`; KeyError removes the entry."""
    if not path:
        return value
    description = copy.deepcopy(description)
    place = description
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return description


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), None),
        ((), []),
        ((), "RegularCell"),
        ((), 3),
        ((), {}),
        (("image",), KeyError),
        (("image",), None),
        (("image",), [3, 8, 8]),
        (("image",), {"constructor": "Conv2d"}),
        (("image", "bits"), KeyError),
        (("image", "extra"), 1),
        (("image", "size"), "8"),
        (("image", "size"), 0),
        (("image", "channels"), 2),
        (("image", "bits"), 9),
        (("image", "padding"), -1),
        (("hierarchy",), KeyError),
        (("hierarchy",), []),
        (("hierarchy",), [["scales", []], ["latent_channels", 2]]),
        (("hierarchy",), "ab"),
        (("hierarchy",), None),
        (("hierarchy", "scales"), KeyError),
        (("hierarchy", "scales"), []),
        (("hierarchy", "scales"), {}),
        (("hierarchy", "scales"), 3),
        (("hierarchy", "scales"), "ab"),
        (("hierarchy", "scales", 0), [4, 16, 1]),
        (("hierarchy", "scales", 0), None),
        (("hierarchy", "scales", 0, "channels"), KeyError),
        (("hierarchy", "scales", 0, "channels"), 0),
        (("hierarchy", "scales", 0, "channels"), "16"),
        (("hierarchy", "scales", 0, "channels"), 16.0),
        (("hierarchy", "scales", 0, "num_groups"), -1),
        (("hierarchy", "scales", 0, "downsample"), 3),
        (("hierarchy", "scales", 0, "downsample"), 8),
        (("hierarchy", "scales", 0, "extra"), 1),
        (("hierarchy", "latent_channels"), 0),
        (("hierarchy", "extra"), 1),
        (("encoder_cell", "constructor"), ["RegularCell"]),
        (("encoder_cell", "constructor"), {"constructor": "RegularCell"}),
        (("encoder_cell", "constructor"), None),
        (("encoder_cell", "constructor"), "a\nb"),
    ],
)
def test_malformed_descriptions_are_refused_in_one_line(
    path: tuple[Any, ...], value: Any, described: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    description = changed(described[0], path, value)
    with pytest.raises(ValueError, match=r"^[^\n]{10,}$"):
        restore(description, {})
    with pytest.raises(ValueError, match=r"^[^\n]{10,500}$"):
        build(NVAE, description, described[1], {})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("encoder_cell",), KeyError, "encoder_cell"),
        (("num_flows",), KeyError, None),  # its default is the model's value
        (("extra",), 1, "'extra'"),
        (("a\nb",), {"constructor": "c"}, r"'a\nb' is 'c'"),
        (("self",), 1, "self"),
        (("config",), {"num_flows": 1}, "config"),
        (("num_flows",), -1, "model.num_flows must be at least 0, got -1"),
        (("num_encoder_cells",), 0, "model.num_encoder_cells must be at least 1"),
        (("first_prior_std",), float("nan"), "the number nan, not finite"),
        (("first_prior_std",), -1.0, "model.first_prior_std must be positive"),
        (("encoder_cell",), "RegularCell", ""),
        (("encoder_cell",), {}, ""),
        (("encoder_cell", "nonsense"), 3, "'nonsense'"),
        (("encoder_cell", "resampling"), 3, ""),
        (("encoder_cell", "in_channels"), 3, "in_channels"),
        (("encoder_cell", "dilations"), [], "dilations must list"),
        (("encoder_cell", "dilations"), ["1"], ""),
        (("encoder_cell", "dilations"), 3, ""),
        (("encoder_cell", "activation"), "ELU", ""),
        (("encoder_cell", "normalization"), {"constructor": "BernoulliLikelihood"}, ""),
        (("encoder_cell", "normalization"), {"constructor": "RegularCell"}, "part of a cell"),
        (("encoder_cell",), {"constructor": "NVAE"}, ""),
        (("encoder_cell", "convolution"), {"constructor": "ELU"}, ""),
        (
            ("encoder_cell", "convolution"),
            {"constructor": "DataDependentConv2d", "bias": False},
            "bias must be True",
        ),
        (("encoder_cell", "constructor"), "BernoulliLikelihood", ""),
        (("encoder_cell", "constructor"), "Conv2d", ""),
        (("decoder_cell", "expansion"), float("inf"), ""),
        (("decoder_cell", "expansion"), 1e308, ""),
        (("decoder_cell", "expansion"), 0, "must leave at least 1, got 0"),
        (("decoder_cell", "kernel_size"), 4, "kernel_size must be odd"),
        (("decoder_cell", "kernel_size"), 10**30 + 1, ""),
        (("decoder_cell", "num_groups"), 3, "num_groups of a cell must divide"),
        (("likelihood", "constructor"), "ELU", ""),
        (("likelihood",), {"constructor": "ELU"}, ""),
        (("likelihood",), {"constructor": "BernoulliLikelihood"}, "image.bits=1"),
        (("likelihood", "num_mixtures"), 0, "num_mixtures must be at least 1"),
        (("likelihood", "num_mixtures"), 10**30, ""),
        (("hierarchy", "scales", 0, "decoder_channels"), -1, ""),
        (("hierarchy", "scales", 0, "channels"), 10**30, ""),
        (("image", "size"), 10, "must be a multiple of 4"),
        # descriptions that do not match the weights
        (("num_flows",), 1, "decoder.groups.0.flows"),
        (("squeeze_excitation",), False, "gate"),
        (("likelihood",), {"constructor": "NormalLikelihood"}, "size mismatch"),
        (("hierarchy", "latent_channels"), 3, "size mismatch"),
    ],
)
def test_descriptions_of_impossible_models_are_refused_in_one_line(
    path: tuple[Any, ...],
    value: Any,
    message: str | None,
    described: tuple[dict[str, Any], dict[str, torch.Tensor]],
) -> None:
    description = changed(described[0], path, value)
    if message is None:
        assert shapes(build(NVAE, description, described[1], {})).keys() == described[1].keys()
        return
    with pytest.raises(ValueError, match=r"^[^\n]{10,500}$") as error:
        build(NVAE, description, described[1], {})
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["ab", [["scales", []], ["latent_channels", 2]], 3, None])
@pytest.mark.parametrize("part", ["image", "hierarchy"])
def test_parts_that_are_not_mappings_are_refused(
    part: str, value: object, build_nvae: BuildNVAE
) -> None:
    description = {**through_json(build_nvae()), part: value}
    with pytest.raises(ValueError, match=r"^not the description of a model"):
        restore(description, {})


def test_deep_nesting_is_refused(build_nvae: BuildNVAE) -> None:
    description = through_json(build_nvae())
    cell: dict[str, Any] = {"constructor": "RegularCell"}
    for _ in range(sys.getrecursionlimit()):
        cell = {"constructor": "RegularCell", "normalization": cell}
    description["encoder_cell"] = cell
    with pytest.raises(ValueError, match="nested more than 16 levels"):
        restore(description, {})


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield every path in nested data."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from paths(item, (*path, key))


def model_or_error(description: object, weights: dict[str, torch.Tensor]) -> NVAE | str:
    try:
        return build(NVAE, description, weights, {})
    except ValueError as error:
        return str(error)


def test_any_replaced_value_is_refused_in_one_line_or_builds_a_model(
    build_nvae: BuildNVAE,
) -> None:
    model = build_nvae(encoder_cell=partial(RegularCell, dilations=(1, 1)))
    description, weights = through_json(model), model.state_dict()
    values = (None, "x", -1, 1.5, [[]], {"constructor": "Conv2d"})
    num_refused = num_built = 0
    for path in paths(description):
        for value in (*values, KeyError) if path else values:
            built = model_or_error(changed(description, path, value), weights)
            if isinstance(built, str):
                assert "\n" not in built, (path, value)
                num_refused += 1
            else:
                assert shapes(built) == shapes(model), (path, value)
                num_built += 1
    assert num_refused > 200
    assert num_built > 10

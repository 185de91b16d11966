import argparse
import io
import json
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from same_model import assert_same
from torch import Tensor, nn
from warm_python import run_python

from nvae_lightning.model import (
    NVAE,
    DiscretizedLogisticMixtureLikelihood,
    Image,
    NormalLikelihood,
)
from nvae_lightning.model.normalization import BatchNorm
from nvae_lightning.published import (
    PublishedSettings,
    load_published,
    published_duplicates,
    published_names,
)

SETTINGS: dict[str, Any] = {
    "dataset": "toy_16",
    "arch_instance": "res_mbconv",
    "num_x_bits": 8,
    "num_latent_scales": 2,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 2,
    "ada_groups": True,
    "min_groups_per_scale": 1,
    "num_channels_enc": 8,
    "num_channels_dec": 8,
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 2,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 2,
    "num_nf": 0,
    "use_se": True,
    "res_dist": True,
    "learning_rate": 0.01,  # one of many settings that do not affect the model
}
ARCHITECTURES = [
    "res_mbconv",
    "res53_mbconv",
    "res35_mbconv",
    "res55_mbconv",
    "res_bnswish",
    "res_bnelu",
    "res_elu",
    "mbconv_sep",
    "mbconv_sep11",
    "mbconv_den",
    "mbconv_res",
]
VARIANTS: dict[str, dict[str, Any]] = {
    "one_flow": {"num_nf": 1},
    "two_flows": {"num_nf": 2},
    "no_gates": {"use_se": False},
    "absolute_posterior": {"res_dist": False},
    "wider_encoder": {"num_channels_enc": 12},
    "wider_decoder": {"num_channels_dec": 12, "num_nf": 1},
    "three_scales": {"num_latent_scales": 3, "num_groups_per_scale": 4},
    "equal_groups": {"ada_groups": False},
    "least_groups": {
        "num_latent_scales": 3,
        "num_groups_per_scale": 4,
        "min_groups_per_scale": 3,
    },
    "one_scale": {"num_latent_scales": 1, "num_groups_per_scale": 1},
    "two_cells": {"num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 3},
    "single_cells": {"num_preprocess_cells": 1, "num_postprocess_cells": 3},
    "two_blocks": {"num_preprocess_blocks": 2, "num_postprocess_blocks": 2},
    "one_mixture": {"num_mixture_dec": 1},
    "three_mixtures": {"num_mixture_dec": 3},
    "five_bits": {"num_x_bits": 5},
    "omniglot": {"dataset": "omniglot"},
}


def build_published(settings: dict[str, Any]) -> NVAE:
    return NVAE(**PublishedSettings.of(settings).arguments)


def _in_use(model: NVAE) -> NVAE:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNorm):
                for tensor in (module.weight, module.bias, module.running_var):
                    assert tensor is not None
                    tensor.uniform_(0.5, 1.5)
                assert module.running_mean is not None
                module.running_mean.normal_(0.0, 0.1)
    return model.eval()


def _weights(model: NVAE, *, duplicates: bool = True) -> dict[str, Tensor]:
    """Return the model's tensors under their published names."""
    names, state = published_names(model), model.state_dict()
    weights = OrderedDict((names[name], tensor) for name, tensor in state.items())
    if duplicates:
        weights.update({again: weights[n] for again, n in published_duplicates(model).items()})
    return weights


def _checkpoint(weights: dict[str, Tensor], **overrides: Any) -> dict[str, Any]:
    moments = {"exp_avg": torch.zeros(2), "exp_inf": torch.zeros(2), "step": 7}
    return {
        "epoch": 3,
        "state_dict": weights,
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 0.01, "params": [0]}]},
        "global_step": 7,
        "args": argparse.Namespace(**{**SETTINGS, **overrides}),
        "arch_instance": {**SETTINGS, **overrides}["arch_instance"],
        "scheduler": {"T_max": 194.0, "base_lrs": [0.01], "_last_lr": [0.01], "verbose": False},
        "grad_scalar": {"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 5},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Path of an intact checkpoint."""
    path = tmp_path / "checkpoint.pt"
    torch.save(_checkpoint(_weights(_in_use(build_published(SETTINGS)))), path)
    return path


# --------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_survives_a_round_trip(architecture: str, tmp_path: Path) -> None:
    model = _in_use(build_published({**SETTINGS, "arch_instance": architecture}))
    weights = _weights(model, duplicates=architecture != "mbconv_den")
    torch.save(_checkpoint(weights, arch_instance=architecture), tmp_path / "checkpoint.pt")
    assert_same(model, load_published(tmp_path / "checkpoint.pt"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_survives_a_round_trip(variant: str, tmp_path: Path) -> None:
    model = _in_use(build_published({**SETTINGS, **VARIANTS[variant]}))
    torch.save(_checkpoint(_weights(model), **VARIANTS[variant]), tmp_path / "checkpoint.pt")
    assert_same(model, load_published(tmp_path / "checkpoint.pt"))


@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        (
            "res_bnswish",
            {
                "pre_process.0._ops.0.bn_act.running_mean": (8,),
                "post_process.0._ops.1.conv_0.weight": (8, 8, 3, 3),
                "dec_tower.1._ops.0.conv_0.log_weight_norm": (16, 1, 1, 1),
            },
        ),
        (
            "res_bnelu",
            {
                "enc_tower.0._ops.1.bn.bn.weight": (16,),
                "dec_tower.1.skip.1.weight": (16, 32, 1, 1),
            },
        ),
        ("res_elu", {"enc_tower.0._ops.0.conv_0.bias": (16,), "enc_tower.1.conv.bias": (16,)}),
        (
            "mbconv_sep",  # a down cell keeps the plain numbers, an up cell shifts them by one
            {
                "pre_process.1._ops.0.conv.0.bn.weight": (8,),
                "pre_process.1._ops.0.conv.2.conv.0.weight": (24, 1, 5, 5),
                "pre_process.1._ops.0.conv.3.weight_normalized": (16, 24, 1, 1),
                "pre_process.1.skip.conv_4.bias": (4,),
                "enc_tower.4._ops.0.conv.1.conv.0.weight": (96, 16, 1, 1),
                "dec_tower.1._ops.0.conv.1.bn.weight": (32,),
                "dec_tower.1._ops.0.conv.3.conv.1.running_var": (192,),
                "post_process.0._ops.0.conv.4.weight": (8, 48, 1, 1),
                "post_process.0._ops.0.conv.5.bn.bias": (8,),
            },
        ),
        (
            "mbconv_sep11",
            {
                "enc_tower.0._ops.0.conv.2.conv.0.weight": (96, 1, 11, 11),
                "dec_tower.2._ops.0.conv.2.conv.0.weight": (96, 1, 11, 11),
                "post_process.1._ops.0.conv.2.conv.0.weight": (24, 1, 5, 5),
            },
        ),
        (
            "mbconv_den",
            {
                "pre_process.0._ops.0.conv.2.conv.0.weight": (24, 3, 5, 5),
                "post_process.0._ops.0.conv.3.conv.0.weight": (48, 6, 5, 5),
                "enc_tower.0._ops.0.conv.2.conv.0.weight": (96, 1, 5, 5),
            },
        ),
        (
            "mbconv_res",
            {
                "enc_tower.0._ops.0.conv.4.bn.weight": (16,),
                "dec_tower.1._ops.0.bn_act.weight": (32,),
                "post_process.0._ops.1.bn_act.weight": (8,),
            },
        ),
        ("res53_mbconv", {"enc_tower.4._ops.0.conv_0.weight": (32, 16, 3, 3)}),
    ],
)
def test_names_and_shapes_match_the_published_ones(
    architecture: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    weights = _weights(build_published({**SETTINGS, "arch_instance": architecture}))
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes
    if architecture == "res_elu":
        assert not [name for name in weights if "running" in name]


@pytest.mark.parametrize(
    ("architecture", "dilations"),
    [
        ("res_mbconv", (1, 1)),
        ("res53_mbconv", (2, 1)),
        ("res35_mbconv", (1, 2)),
        ("res55_mbconv", (2, 2)),
    ],
)
def test_fives_in_a_name_are_dilated_convolutions_of_the_encoder(
    architecture: str, dilations: tuple[int, int]
) -> None:
    model = build_published({**SETTINGS, "arch_instance": architecture})
    for cells in [model.encoder.preprocess, *model.encoder.groups]:
        for cell in cells.children():
            body = [c for c in cell.get_submodule("body").modules() if isinstance(c, nn.Conv2d)]
            assert tuple(c.dilation[0] for c in body) == dilations
            assert tuple(c.padding[0] for c in body) == dilations  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("num_names", "num_duplicates", "settings"),
    [
        (
            2016,
            105,
            {
                "dataset": "mnist",
                "num_groups_per_scale": 10,
                "num_channels_enc": 32,
                "num_channels_dec": 32,
                "num_preprocess_blocks": 2,
                "num_postprocess_blocks": 2,
                "num_preprocess_cells": 3,
                "num_postprocess_cells": 3,
            },
        ),
        (
            3838,
            180,
            {
                "dataset": "cifar10",
                "num_latent_scales": 1,
                "num_groups_per_scale": 30,
                "num_channels_enc": 128,
                "num_channels_dec": 128,
                "num_nf": 1,
            },
        ),
        (
            5354,
            228,
            {
                "dataset": "ffhq",
                "num_latent_scales": 5,
                "num_groups_per_scale": 16,
                "min_groups_per_scale": 4,
                "num_channels_enc": 30,
                "num_channels_dec": 30,
                "num_nf": 2,
            },
        ),
    ],
    ids=["mnist", "cifar10", "ffhq"],
)
def test_published_models_have_the_published_number_of_names(
    num_names: int, num_duplicates: int, settings: dict[str, Any]
) -> None:
    common = {"num_latent_per_group": 20, "num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 2}
    with torch.device("meta"):
        model = build_published({**SETTINGS, **common, **settings})
    assert len(published_duplicates(model)) == num_duplicates
    assert len(published_names(model)) + num_duplicates == num_names


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({"num_latent_scales": 3, "num_groups_per_scale": 20}, [5, 10, 20]),
        (
            {"num_latent_scales": 5, "num_groups_per_scale": 16, "min_groups_per_scale": 4},
            [4, 4, 4, 8, 16],
        ),
        ({"num_latent_scales": 2, "num_groups_per_scale": 3, "ada_groups": False}, [3, 3]),
    ],
)
def test_groups_per_scale(settings: dict[str, Any], groups: list[int]) -> None:
    with torch.device("meta"):
        model = build_published({**SETTINGS, "dataset": "toy_64", **settings})
    assert [scale.num_groups for scale in model.hierarchy.scales] == groups


@pytest.mark.parametrize(
    ("dataset", "image"),
    [
        ("mnist", Image(1, 28, 1, padding=2)),
        ("omniglot", Image(1, 28, 1, padding=2)),
        ("cifar10", Image(3, 32, 5)),
        ("imagenet_32", Image(3, 32, 5)),
        ("celeba_64", Image(3, 64, 5)),
        ("celeba_256", Image(3, 256, 5)),
        ("lsun_bedroom_128", Image(3, 128, 5)),
        ("ffhq", Image(3, 256, 5)),
    ],
)
def test_dataset_decides_the_image(dataset: str, image: Image) -> None:
    with torch.device("meta"):
        model = build_published({**SETTINGS, "dataset": dataset, "num_x_bits": 5})
    assert model.image == image


def test_settings_that_older_checkpoints_lack_have_defaults() -> None:
    later = ("ada_groups", "min_groups_per_scale", "num_mixture_dec")
    model = build_published({name: v for name, v in SETTINGS.items() if name not in later})
    assert [scale.num_groups for scale in model.hierarchy.scales] == [2, 2]
    assert model.likelihood.num_logits == 100


def test_older_checkpoints_of_the_legacy_format_are_read(file: Path, tmp_path: Path) -> None:
    content = torch.load(file, weights_only=False)
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert_same(load_published(file), load_published(tmp_path / "legacy.pt"))


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    model = _in_use(build_published(SETTINGS))
    weights = {n: t for n, t in _weights(model).items() if "num_batches" not in n}
    torch.save(_checkpoint(weights), tmp_path / "checkpoint.pt")
    assert_same(model, load_published(tmp_path / "checkpoint.pt"))


def test_model_is_in_evaluation_mode_with_published_numerics(file: Path) -> None:
    model = load_published(file)
    assert not model.training
    assert model.decoder.groups[0].prior_std == 1.01
    assert isinstance(model.likelihood, DiscretizedLogisticMixtureLikelihood)
    assert model.likelihood.published_tails
    assert model.likelihood.published_temperature


def test_our_own_models_do_not_use_the_published_numerics(colour_nvae: NVAE) -> None:
    assert colour_nvae.decoder.groups[0].prior_std == 1.0
    assert isinstance(colour_nvae.likelihood, DiscretizedLogisticMixtureLikelihood)
    assert not colour_nvae.likelihood.published_tails
    assert not colour_nvae.likelihood.published_temperature


# ------------------------------------------------------------------------- published numerics


def _grey_mixture(bits: int, mean: float, log_scale: float, **options: bool) -> Any:
    image = Image(channels=1, size=1, bits=bits)
    logits = torch.tensor([0.0, mean, log_scale], dtype=torch.float64).view(1, 3, 1, 1)
    logits = logits.expand(2**bits, 3, 1, 1)
    return DiscretizedLogisticMixtureLikelihood(image, 1, **options)(logits)


def _sum_of_probabilities(distribution: Any) -> float:
    levels = len(distribution.logits)
    x = torch.linspace(0, 1, levels, dtype=torch.float64).view(-1, 1, 1, 1)
    return distribution.log_prob(x).exp().sum().item()


@pytest.mark.parametrize(
    ("mean", "log_scale", "published"),
    [(0.0, -2.0, 1.0006), (0.98, -2.0, 1.47), (1.0, -5.0, 1.64)],
)
def test_published_tails_give_8_bits_too_much_probability(
    mean: float, log_scale: float, published: float
) -> None:
    options = {"published_tails": True}
    total = _sum_of_probabilities(_grey_mixture(8, mean, log_scale, **options))
    assert total == pytest.approx(published, rel=5e-3)
    assert _sum_of_probabilities(_grey_mixture(8, mean, log_scale)) == pytest.approx(1.0)
    assert _sum_of_probabilities(_grey_mixture(5, mean, log_scale, **options)) == pytest.approx(
        1.0, abs=1e-4
    )


@pytest.mark.parametrize(("published", "factor"), [(False, 0.5), (True, 2.0)])
def test_temperature_narrows_logistics_unless_published(published: bool, factor: float) -> None:
    distribution = _grey_mixture(8, 0.0, -4.0, published_temperature=published)
    torch.manual_seed(1)
    plain = distribution.sample(1.0) - 0.5
    torch.manual_seed(1)
    torch.testing.assert_close(distribution.sample(0.5) - 0.5, factor * plain)


def test_published_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="published_temperature=False"):
        _grey_mixture(8, 0.0, 0.0, published_temperature=True).sample(0.0)


def test_normal_likelihood_is_a_density_on_minus_one_to_one() -> None:
    likelihood = NormalLikelihood(Image(channels=3, size=2, bits=8))
    logits = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    mean = 5 * (logits[:, :3] / 5).tanh()
    std = (5 * (logits[:, 3:] / 5).tanh()).exp() + 1e-2
    x = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(2 * x - 1).sum((1, 2, 3))
    torch.testing.assert_close(likelihood(logits).log_prob(x), expected)
    torch.testing.assert_close(likelihood(logits).mean, (mean.clamp(-1, 1) + 1) / 2)
    torch.testing.assert_close(likelihood(logits).sample(0.0), likelihood(logits).mean)


# ---------------------------------------------------------------------------- refused files


class _CreatesAFile:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def _refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_published(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "pickle_2"])
def test_file_that_would_run_code_is_refused_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    content = {**_checkpoint({}), "optimizer": _CreatesAFile(made)}
    path = tmp_path / "checkpoint.pt"
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=2 if kind == "pickle_2" else None))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    message = _refusal(path)
    assert "nothing in it was run" in message
    if kind in ("zip", "legacy"):
        assert "mkdir" in message
    assert not made.exists()
    with path.open("rb") as file:  # the file is indeed harmful
        if kind.startswith("pickle"):
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert made.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_truncated_file_is_refused(share: float, is_zip: bool, file: Path, tmp_path: Path) -> None:
    content = torch.load(file, weights_only=False)
    whole = io.BytesIO()
    torch.save(content, whole, _use_new_zipfile_serialization=is_zip)
    path = tmp_path / "truncated.pt"
    path.write_bytes(whole.getvalue()[: int(share * whole.tell())])
    message = _refusal(path)
    assert "is damaged" in message


def test_folder_or_missing_file_is_refused(tmp_path: Path) -> None:
    assert "it is not a regular file" in _refusal(tmp_path)
    assert "does not exist" in _refusal(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([1, 2], "does not hold the settings ('args')"),
        ({"weight": torch.zeros(2)}, "does not hold the settings ('args')"),
        ({"state_dict": {}, "epoch": 3}, "does not hold the settings ('args')"),
        ({"state_dict": {}, "args": "--dataset mnist"}, "does not hold the settings ('args')"),
        ({"state_dict": [], "args": argparse.Namespace()}, "and weights ('state_dict')"),
        ({"state_dict": {"a": 1}, "args": argparse.Namespace()}, "no tensor at 'a'"),
        (
            {"state_dict": {}, "args": argparse.Namespace()},
            "dataset: Field required; arch_instance:",
        ),
    ],
)
def test_other_content_is_refused(content: Any, found: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    assert found in _refusal(tmp_path / "checkpoint.pt")


def test_every_weight_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    weights = _weights(build_published(SETTINGS))
    del weights["stem.bias"], weights["enc0.1.weight"]
    weights["stem.weight"] = torch.zeros(3)
    weights["extra.weight"] = weights["stem.weight_normalized"] = torch.zeros(1)
    again = "post_process.1._ops.0.conv.3.weight_normalized"
    weights[again] = weights[again] + 1
    torch.save(_checkpoint(weights), tmp_path / "checkpoint.pt")
    message = _refusal(tmp_path / "checkpoint.pt")
    for found in (
        "missing are enc0.1.weight, stem.bias;",
        "unknown are extra.weight, stem.weight_normalized;",
        "stem.weight has shape (3,) instead of (8, 3, 3, 3);",
        f"{again} differs from post_process.1._ops.0.conv.3.weight:",
    ):
        assert found in message


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"arch_instance": "res_conv"}, "choose from mbconv_den.*res_mbconv"),
        ({"dataset": "landscapes"}, "choose mnist, omniglot, cifar10, ffhq or a name"),
        ({"num_nf": -1}, "num_nf: Input should be greater than or equal to 0, got -1"),
        ({"num_latent_scales": 0}, "num_latent_scales: Input should be greater"),
        ({"use_se": "yes"}, "use_se: Input should be a valid boolean, got 'yes'"),
        ({"num_channels_enc": 8.0}, "num_channels_enc: Input should be a valid integer"),
        ({"num_postprocess_blocks": 2}, "must be equal"),
        ({"num_latent_scales": 5}, "must be a multiple of 32"),
        ({"num_x_bits": 9}, "image.bits"),
    ],
)
def test_settings_that_do_not_describe_a_model_are_refused(
    overrides: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        build_published({**SETTINGS, **overrides})


def test_weights_without_a_published_name_are_refused(colour_nvae: NVAE) -> None:
    colour_nvae.decoder.head.append(nn.PReLU())
    with pytest.raises(ValueError, match=r"decoder\.head\.2\.weight"):
        published_names(colour_nvae)


# -------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_lists_the_published_numerics(file: Path, tmp_path: Path) -> None:
    arguments = ("checkpoint=checkpoint.pt", "output=converted")
    run = run_python("-m", "nvae_lightning.convert", *arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    for option in ("first_prior_std=1.01", "published_tails=true", "published_temperature=true"):
        assert option in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "converted"]
    assert_same(load_published(file), NVAE.from_pretrained(tmp_path / "converted"))
    run = run_python("-m", "nvae_lightning.convert", *arguments, cwd=tmp_path)
    assert run.stderr == "error: output: 'converted' is not empty; name another folder\n"


def test_converted_model_equals_the_published_one(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "converted"
    load_published(file).save_pretrained(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["converted"]
    files = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["first_prior_std"] == 1.01
    assert config["model"]["likelihood"]["published_tails"]
    assert_same(load_published(file), NVAE.from_pretrained(folder))


@pytest.mark.parametrize("damage", ["config", "weights", "version", "shape", "none_there"])
def test_damaged_converted_folder_is_refused(damage: str, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "output"
    load_published(file).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    match damage:
        case "config":
            (folder / "config.json").write_text("{")
        case "weights":
            (folder / "model.safetensors").write_bytes(b"12345678{")
        case "version":
            (folder / "config.json").write_text(json.dumps({**config, "version": 99}))
        case "shape":
            config["model"]["hierarchy"]["latent_channels"] += 1
            (folder / "config.json").write_text(json.dumps(config))
        case "none_there":
            folder = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        NVAE.from_pretrained(folder)

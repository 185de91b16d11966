"""A run's config.yaml may come from a stranger: nothing in it is resolved or run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nvae_lightning.cli.config_root import CONFIG_ROOT
from nvae_lightning.cli.plain_yaml import read_yaml
from nvae_lightning.cli.trained import images_for, trained_model, training_data
from nvae_lightning.data import MNIST5k
from nvae_lightning.model import NVAE, BernoulliLikelihood, Image
from nvae_lightning.serialization.architecture import ARCHITECTURE

BuildNVAE = Callable[..., NVAE]
Config = Callable[..., Any]

IMAGE = {"channels": 1, "size": 28, "bits": 1, "padding": 2}
DATASET: dict[str, Any] = {
    "_target_": "nvae_lightning.data.MNIST5k",
    "batch_size": 16,
    "image": {"_target_": "nvae_lightning.data.Image", **IMAGE},
    "num_workers": None,
}


class OwnLikelihood(BernoulliLikelihood):
    """A likelihood from outside the package."""

    def __init__(self, image: Image, offset: float = 0.0) -> None:
        super().__init__(image)
        self.offset = offset


@pytest.fixture
def model(build_nvae: BuildNVAE) -> NVAE:
    """Binary images of 28x28 pixels, padded to 32x32."""
    return build_nvae(Image(1, 28, 1, padding=2), likelihood=BernoulliLikelihood)


def save(model: NVAE, run: Path) -> Path:
    """Write a checkpoint as a training does, and return the folder of the run."""
    (run / "checkpoints").mkdir(parents=True)
    content = {
        "pytorch-lightning_version": "2.6",
        ARCHITECTURE: model.architecture,
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
    }
    torch.save(content, run / "checkpoints" / "last.ckpt")
    return run


@pytest.fixture
def run(model: NVAE, tmp_path: Path) -> Path:
    """The folder of a run without its config.yaml."""
    return save(model, tmp_path / "run")


@pytest.fixture
def config(run: Path) -> Iterator[Config]:
    """Config of a command for the run, also set as Hydra's."""

    def make(*overrides: str, command: str = "evaluate") -> Any:
        with initialize_config_dir(str(CONFIG_ROOT / "conf"), version_base="1.3"):
            settings = compose(
                command, overrides=[f"ckpt_path={run}", *overrides], return_hydra_config=True
            )
        HydraConfig.instance().set_config(settings)
        return settings

    yield make
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


def write(run: Path, dataset: Any) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({"dataset": dataset}), encoding="utf-8")


def changed(**changes: Any) -> dict[str, Any]:
    return {**DATASET, **changes}


def refusal(config: Any, model: NVAE) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]{20,700}$") as error:
        training_data(config, model)
    assert "\x1b" not in str(error.value)
    return str(error.value)


def test_the_dataset_of_the_training_is_built_with_the_given_settings(
    run: Path, config: Config, model: NVAE
) -> None:
    write(run, changed(test_fraction=0.25))
    data = training_data(config("dataset.batch_size=5", "seed=3"), model)
    assert type(data) is MNIST5k
    assert (data.batch_size, data.image.size, data.seed) == (5, 28, 3)
    assert data.wanted.test_fraction == 0.25


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "joblib.load",
        "builtins.eval",
        "mymod.Data",
        "nvae_lightning.data.AllImages",
        "nvae_lightning.data.ImageDataModule",
        "nvae_lightning.data.Datasets",
        "nvae_lightning.train.main",
        "\x1b[2Jos.system",
        None,
        ["nvae_lightning.data.MNIST5k"],
    ],
)
def test_other_classes_are_not_imported(
    target: object, run: Path, config: Config, model: NVAE
) -> None:
    write(run, changed(_target_=target))
    message = refusal(config(), model)
    assert "is not imported because a file names it; add dataset=NAME" in message
    assert "dataset._target_=MODULE.CLASS" in message


def test_a_target_in_the_image_of_a_run_is_not_run(
    run: Path, config: Config, model: NVAE, tmp_path: Path
) -> None:
    image = {"_target_": "os.mkdir", "path": str(tmp_path / "harm")}
    write(run, {**DATASET, "image": {**image, **IMAGE}})
    assert type(training_data(config(), model)) is MNIST5k
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "${oc.env:HOME}"}, "dataset.root"),
        (
            {"interpolation": "${oc.env:HOME}"},
            "dataset.interpolation: got '${oc.env:HOME}', which",
        ),
        ({"batch_size": "16"}, "dataset.batch_size: got '16', but it must be a valid integer"),
        ({"batch_size": True}, "dataset.batch_size"),
        ({"batch_size": {"_target_": "os.getcwd"}}, "dataset.batch_size"),
        ({"crop": {"_target_": "os.getcwd"}}, "dataset.crop"),
        ({"crop": ["a"] * 5000}, "dataset.crop"),
        ({"test_fraction": float("nan")}, "number nan"),
        ({"test_fraction": 1e300}, "beyond 64 bits"),
        ({"nonsense": 1}, "dataset.nonsense: MNIST5k does not take it"),
        ({"_args_": [1]}, "dataset._args_: MNIST5k does not take it"),
        ({"_partial_": True}, "dataset._partial_"),
        ({"image": {**IMAGE, "size": 32}}, "'size': 32"),
        ({"image": 28}, "has 28; choose the dataset that it was trained on: add dataset=NAME"),
    ],
)
def test_settings_of_other_types_are_refused(
    changes: dict[str, Any], message: str, run: Path, config: Config, model: NVAE
) -> None:
    write(run, changed(**changes))
    assert message in refusal(config(), model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is not a mapping"),
        ("[]", "it is not a mapping"),
        ("a: 1", "names no dataset"),
        ("dataset: mnist", "names no dataset"),
        ("dataset: !!python/object/apply:os.mkdir [harm]", "is not plain YAML at line 1"),
        ("dataset: !!python/name:os.system", "is not plain YAML"),
        ("dataset: {datamodule: !!binary aGk=}", "holds a bytes"),
        ("a: &a [1]\ndataset: *a", "it has anchors"),
        ("a: 1\na: 2", "is not plain YAML at line 2"),
        ("a: .nan", "number nan"),
        ("a: " + "9" * 5000, "does not hold the settings of a run"),
        ("a: " + "[" * 100_000, "maximum recursion depth"),
        ("a: " + "{b: " * 50_000, "maximum recursion depth"),
        ("- " * 100_000, "maximum recursion depth"),
        ("a: [" + "1, " * 80_000 + "]", "more than 20,000 values"),
        ("a: " + "[" * 20 + "]" * 20, "more than 16 levels"),
        ("a" * 300_000, "has more than 262,144 bytes"),
        ("a: 1\0", "is not plain YAML"),
        (b"\xff\xfe\x00\xd8", "it is not text"),
        ("a: [", "is not plain YAML at line 1"),
        ("--- 1\n--- 2", "is not plain YAML"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_anything_but_plain_yaml_is_refused(
    content: str | bytes, message: str, run: Path, config: Config, model: NVAE
) -> None:
    content = content.encode() if isinstance(content, str) else content
    (run / "config.yaml").write_bytes(content)
    started = time.process_time()
    found = refusal(config(), model)
    assert time.process_time() - started < 10
    assert message in found
    assert "add dataset=NAME" in found
    assert not Path("harm").exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "missing"])
def test_special_files_are_not_opened(
    kind: str, run: Path, config: Config, model: NVAE, tmp_path: Path
) -> None:
    path = run / "config.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    message = refusal(config(), model)
    assert "config.yaml" in message
    assert "add dataset=NAME" in message


def test_a_config_written_by_a_training_is_read_unchanged(tmp_path: Path) -> None:
    content = {
        "lr": 1e-5, "run_id": "12e45678", "number": "007", "now": "2026-01-02", "empty": None,
        "flag": "true", "list": [1, 2.5, "a: b"], "text": "é\n", "colon": "1:30",
    }  # fmt: skip
    OmegaConf.save(OmegaConf.create(content), tmp_path / "config.yaml")
    assert read_yaml(tmp_path / "config.yaml") == content
    (tmp_path / "config.yaml").write_text("lr: 1e-3\ndate: 2026-01-02\n")
    assert read_yaml(tmp_path / "config.yaml") == {"lr": 1e-3, "date": "2026-01-02"}


def test_images_are_cropped_as_in_the_run_or_a_named_dataset(
    run: Path, config: Config, model: NVAE, tmp_path: Path
) -> None:
    score = (f"images={tmp_path}",)
    write(run, changed(_target_="mymod.Data", crop=[1, 2, 3, 4], interpolation="box"))
    data = images_for(config(*score, command="score"), model, "images")
    assert (data.decoder.crop, data.decoder.interpolation) == ((1, 2, 3, 4), "box")
    write(run, changed(crop="${oc.env:HOME}"))
    with pytest.raises(ValueError, match=r"dataset\.crop: got "):
        images_for(config(*score, command="score"), model, "images")
    named = config(*score, "dataset=image_folder", "dataset.crop=[0,0,8,8]", command="score")
    assert images_for(named, model, "images").decoder.crop == (0, 0, 8, 8)


# -------------------------------------------------------------------------- foreign constructors


def test_a_custom_likelihood_is_named_on_the_command_line(
    build_nvae: BuildNVAE, config: Config, run: Path, tmp_path: Path
) -> None:
    image = Image(1, 28, 1, padding=2)
    own = save(build_nvae(image, likelihood=OwnLikelihood), tmp_path / "own")
    name = rf"'{OwnLikelihood.__module__}.OwnLikelihood'"
    with pytest.raises(ValueError, match=rf"likelihood is {name}, which is not part of this pack"):
        trained_model(config(f"ckpt_path={own}"))
    target = f"model.likelihood._target_={OwnLikelihood.__module__}.OwnLikelihood"
    for command, more in (("evaluate", ()), ("sample", ()), ("score", ("images=photos",))):
        given = (f"ckpt_path={own}", target, "+model.likelihood.offset=1.5", *more)
        model = trained_model(config(*given, command=command))
        assert isinstance(model.likelihood, OwnLikelihood)
        assert model.likelihood.offset == 1.5
    with pytest.raises(ValueError, match=r"model\.likelihood: got settings without a class"):
        trained_model(config("+model.likelihood.offset=1.5"))


def test_non_finite_weights_are_loaded_if_allowed(
    model: NVAE, config: Config, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    run = save(model, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"encoder|decoder.*1 of .* NaN or infinite"):
        trained_model(config(f"ckpt_path={run}"))
    trained_model(config(f"ckpt_path={run}", "allow_nonfinite=true"))

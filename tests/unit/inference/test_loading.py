"""Loading from checkpoints, run folders and save_pretrained folders works or gives one line."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from same_model import assert_same
from torch import Tensor

from nvae_lightning.inference.loading import find_checkpoint, load_model, load_models
from nvae_lightning.model import NVAE, DepthwiseCell, RegularCell
from nvae_lightning.objective import KL, Penalty, constant
from nvae_lightning.published import PublishedSettings, load_published, published_names
from nvae_lightning.serialization.checkpoints import read_checkpoint
from nvae_lightning.training.callbacks import EMA, Checkpoint
from nvae_lightning.training.checkpoints import AtomicCheckpointIO
from nvae_lightning.training.module import NVAEModule

BuildNVAE = Callable[..., NVAE]
Train = Callable[..., NVAE]

PUBLISHED: dict[str, Any] = {
    "dataset": "toy_8",
    "arch_instance": "res_mbconv",
    "num_x_bits": 8,
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 2,
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 1,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 1,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 2,
    "num_nf": 0,
    "use_se": True,
    "res_dist": True,
}


@pytest.fixture
def train(build_nvae: BuildNVAE, tmp_path: Path) -> Train:
    """Train a tiny model for two steps, with checkpoints in a folder."""

    def run(folder: Path, *callbacks: Callback, num_steps: int = 2, **overrides: Any) -> NVAE:
        module = NVAEModule(
            build_nvae(**overrides),
            kl=KL(beta=constant),
            penalty=Penalty(weight=0.01, spectral=True),
            optimizer=partial(torch.optim.SGD, lr=1e-3),
            final_learning_rate=1e-3,
            warmup_epochs=0,
        )
        checkpoint = Checkpoint(str(folder / "checkpoints"), every_n_train_steps=1)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=num_steps,
            limit_val_batches=0,
            logger=False,
            plugins=[AtomicCheckpointIO()],
            callbacks=[*callbacks, checkpoint],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        image = module.model.image
        shape = (16, image.channels, image.size, image.size)
        images = torch.utils.data.DataLoader(torch.rand(shape).round(), batch_size=8)  # pyright: ignore[reportArgumentType]
        trainer.fit(module, images, images)
        assert trainer.global_step == num_steps
        return module.model

    return run


@pytest.fixture(scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def run_folder(_cache: Path, train: Train, tmp_path: Path) -> Path:
    """A copy of the folder of a training: two checkpoints and the final weights."""
    if not (_cache / "run").exists():
        model = train(_cache / "run")
        torch.save(model.state_dict(), _cache / "run" / "weights.pt")
    return shutil.copytree(_cache / "run", tmp_path / "run", symlinks=True)


@pytest.fixture
def checkpoint(run_folder: Path) -> Path:
    """The newest checkpoint of a training, without its run folder."""
    path = run_folder.parent / "one.ckpt"
    shutil.copy(run_folder / "checkpoints" / "step0000002.ckpt", path)
    return path


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, NVAE]:
    """A checkpoint in the format of the published code, and its model."""
    model = NVAE(**PublishedSettings.of(PUBLISHED).arguments).eval()
    names = published_names(model)
    weights = {names[name]: tensor for name, tensor in model.state_dict().items()}
    content = {"state_dict": weights, "args": argparse.Namespace(**PUBLISHED), "epoch": 3}
    torch.save(content, tmp_path / "published.pt")
    return tmp_path / "published.pt", model


def assert_weights(model: NVAE, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def refusal(source: str | Path, named: str | Path | None = None, **given: Any) -> str:
    """Return the one-line error of loading a file, which names the file."""
    with pytest.raises(ValueError, match=re.escape(f"'{named or source}'")) as error:
        load_model(source, **given)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 900
    return message


def change(path: Path, **changes: Any) -> None:
    """Change the content of a checkpoint; KeyError removes an item."""
    content = {**torch.load(path, weights_only=True), **changes}
    torch.save({name: v for name, v in content.items() if v is not KeyError}, path)


# ------------------------------------------------------------------------------ places of models


def test_the_model_of_a_training_is_loaded_from_its_checkpoint(
    train: Train, tmp_path: Path
) -> None:
    model = train(tmp_path / "run").eval()
    folder = tmp_path / "run" / "checkpoints"
    for name in ("last.ckpt", "step0000002.ckpt"):
        loaded = load_model(folder / name)
        assert not any(module.training for module in loaded.modules())
        assert loaded.architecture == model.architecture
        assert_same(loaded, model)
    first = load_model(str(folder / "step0000001.ckpt")).state_dict()
    assert any(not torch.equal(first[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_the_newest_checkpoint_of_a_run_folder_is_loaded(below: str, run_folder: Path) -> None:
    expected = torch.load(run_folder / "weights.pt", weights_only=True)
    assert_weights(load_model(run_folder / below), expected)
    assert_weights(load_model(str(run_folder / below)), expected)


def test_a_relative_path_and_a_home_folder_are_found(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = (run_folder / "checkpoints" / "step0000002.ckpt").resolve()
    monkeypatch.chdir(run_folder.parent)
    monkeypatch.setenv("HOME", str(run_folder.parent))
    for source in ("run", Path("run"), "run/checkpoints", "./run", "~/run", "~/run/checkpoints"):
        assert find_checkpoint(source) == newest
    path = find_checkpoint("run/checkpoints/last.ckpt")
    assert path is not None
    assert path.is_absolute()
    assert path.resolve() == newest


def test_an_older_checkpoint_replaces_a_damaged_one(run_folder: Path) -> None:
    folder = run_folder / "checkpoints"
    newest = folder / "step0000002.ckpt"
    times = newest.stat()
    newest.write_bytes(newest.read_bytes()[:-100])
    os.utime(newest, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.warns(UserWarning, match=r"0002.ckpt' is damaged .*an older one is used"):
        loaded = load_model(run_folder)
    assert_weights(loaded, load_model(folder / "step0000001.ckpt").state_dict())
    refusal(newest)  # because it was requested by name


def test_a_folder_of_save_pretrained_is_loaded(colour_nvae: NVAE, tmp_path: Path) -> None:
    colour_nvae.save_pretrained(tmp_path)
    assert find_checkpoint(tmp_path) is None
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert_same(loaded, colour_nvae)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_published_checkpoint_is_loaded(is_zip: bool, published: tuple[Path, NVAE]) -> None:
    path, model = published
    content = torch.load(path, weights_only=False)
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    loaded = load_model(path)
    assert not loaded.training
    assert loaded.architecture == model.architecture
    assert_same(loaded, model)


def test_a_converted_checkpoint_is_loaded(published: tuple[Path, NVAE], tmp_path: Path) -> None:
    path, model = published
    load_published(path).save_pretrained(tmp_path / "converted")
    assert_same(load_model(tmp_path / "converted"), model)


def test_a_hub_name_is_downloaded(
    colour_nvae: NVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colour_nvae.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    names = []

    def download(name: str, file: str) -> str:
        names.append(name)
        return str(tmp_path / "saved" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_same(load_model("owner/name"), colour_nvae)
    assert names == ["owner/name", "owner/name"]
    refusal("saved/name")  # the folder exists, so this is a path


# ------------------------------------------------------------------------------ averaged weights


class Spy(Callback):
    """Record the parameters after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, NVAEModule)
        state = pl_module.model.state_dict()
        self.seen.append({name: tensor.clone() for name, tensor in state.items()})


def test_averaged_weights_are_loaded(train: Train, tmp_path: Path) -> None:
    spy = Spy()
    train(tmp_path / "run", spy, EMA(decay=0.75), num_steps=2)
    loaded = load_model(tmp_path / "run")
    first, last = spy.seen
    parameters = dict(loaded.named_parameters())
    difference = 0.0
    for name, tensor in loaded.state_dict().items():
        if name in parameters:
            torch.testing.assert_close(tensor, first[name].lerp(last[name], 9 / 11), msg=name)
            difference = max(difference, (tensor - last[name]).abs().max().item())
        else:  # running statistics and counts are not averaged
            assert torch.equal(tensor, last[name]), name
    assert difference > 1e-4
    # Also from the checkpoint of an unfinished training, which also contains the latest weights.
    content = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    latest = content["current_model_state"]
    assert all(torch.equal(latest[f"model.{name}"], tensor) for name, tensor in last.items())
    averaged, unaveraged = load_models(tmp_path / "run")
    assert_weights(averaged, loaded.state_dict())
    assert_weights(unaveraged, last)
    assert_weights(load_model(tmp_path / "run", averaged=False), last)


# ---------------------------------------------------------------------------------- other cells


class Kind(enum.Enum):
    """An argument for a cell from outside the package."""

    ONE = 1


class OwnCell(RegularCell):
    """A cell from outside the package."""

    def __init__(self, *args: Any, kind: Kind, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = kind


def test_a_model_with_cells_from_outside_is_loaded_if_they_are_given(
    train: Train, tmp_path: Path
) -> None:
    cell = partial(OwnCell, kind=Kind.ONE)
    model = train(tmp_path / "run", encoder_cell=cell)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(path)["global_step"] == 2  # like a resumed training
    message = refusal(path)
    assert "encoder_cell is '" in message
    assert "pass it as encoder_cell=CONSTRUCTOR" in message
    for source in (path, tmp_path / "run"):
        assert_same(load_model(source, encoder_cell=cell), model)
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_model(tmp_path / "saved", encoder_cell=cell), model)


def test_unsuitable_arguments_are_refused(checkpoint: Path, published: tuple[Path, NVAE]) -> None:
    assert "encoder." in refusal(checkpoint, encoder_cell=DepthwiseCell)
    assert "unexpected keyword argument 'nonsense'" in refusal(checkpoint, nonsense=1)
    assert "accepts no first_prior_std" in refusal(published[0], first_prior_std=1.0)
    assert load_model(checkpoint, first_prior_std=2.0).decoder.groups[0].prior_std == 2.0


# --- refused sources ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "missing.ckpt", "runs/2024/missing", "a b/c"])
def test_missing_sources_are_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        pytest.fail("asked the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    for source in (name, tmp_path / name, f"./{name}"):
        message = refusal(source)
        assert "does not exist; give a checkpoint, the folder of a run, or one of mnist" in message


def test_folders_without_a_model_are_named(tmp_path: Path) -> None:
    assert "contains no intact checkpoint and no config.json" in refusal(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("gone.ckpt")
    (tmp_path / "notes.txt").write_text("text")
    assert "contains no intact checkpoint and no config.json" in refusal(tmp_path)
    (tmp_path / "checkpoints" / "step.ckpt").write_bytes(b"PK damaged")
    with pytest.warns(UserWarning, match="is damaged"):
        assert "contains no intact checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("missing", ["model.safetensors", "content"])
def test_damaged_folders_of_save_pretrained_are_named(
    missing: str, colour_nvae: NVAE, tmp_path: Path
) -> None:
    colour_nvae.save_pretrained(tmp_path)
    if missing == "content":
        (tmp_path / "config.json").write_text("{}")
    else:
        (tmp_path / missing).unlink()
    assert ("format and version" if missing == "content" else missing) in refusal(tmp_path)


def test_truncated_checkpoints_are_refused(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    lengths = random.Random(0).sample(range(len(content)), 20)
    for length in (0, len(content) - 1, *lengths):
        checkpoint.write_bytes(content[:length])
        message = refusal(checkpoint)
        assert "is damaged" in message


def model_or_error(path: Path) -> NVAE | str:
    try:
        return load_model(path)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["training", "published"])
def test_changed_bytes_in_checkpoints_are_refused_or_harmless(
    kind: str, checkpoint: Path, published: tuple[Path, NVAE]
) -> None:
    path = checkpoint if kind == "training" else published[0]
    expected = load_model(path).state_dict()
    content = path.read_bytes()
    generator = random.Random(0)
    num_refused = 0
    for position in generator.sample(range(len(content)), 60):
        byte = content[position] ^ generator.randrange(1, 256)
        path.write_bytes(content[:position] + bytes([byte]) + content[position + 1 :])
        model = model_or_error(path)
        if isinstance(model, str):
            assert str(path) in model
            assert "\n" not in model
            num_refused += 1
        else:  # padding between tensors, or an unused field of the format
            assert_weights(model, expected)
    assert num_refused > 30


@pytest.mark.parametrize("kind", ["training", "published"])
def test_changed_bytes_in_weights_are_detected(
    kind: str, checkpoint: Path, published: tuple[Path, NVAE]
) -> None:
    path = checkpoint if kind == "training" else published[0]
    with zipfile.ZipFile(path) as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        data = archive.read(max(tensors, key=lambda info: info.file_size))
    content = bytearray(path.read_bytes())
    content[content.index(data) + len(data) // 2] ^= 64
    path.write_bytes(content)
    assert "is damaged (wrong checksum of" in refusal(path)


class Harmful:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("place", ["state_dict", "architecture", "extra", "whole"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    form: str, place: str, checkpoint: Path, tmp_path: Path
) -> None:
    harm = tmp_path / "harm"
    content: Any = {**torch.load(checkpoint, weights_only=True), place: Harmful(harm)}
    content = content["whole"] if place == "whole" else content
    if form == "pickle":
        checkpoint.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, checkpoint, _use_new_zipfile_serialization=form == "zip")
    assert "nothing in it was run" in refusal(checkpoint)
    assert not harm.exists()
    # The pickle is indeed harmful.
    if form == "pickle":
        pickle.loads(checkpoint.read_bytes())
    else:
        torch.load(checkpoint, weights_only=False)
    assert harm.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "subprocess.run"])
def test_a_description_that_would_run_code_is_refused_and_runs_nothing(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    architecture = torch.load(checkpoint, weights_only=True)["architecture"]
    architecture["likelihood"] = {"constructor": name, "command": "mkdir harm"}
    change(checkpoint, architecture=architecture)
    assert f"likelihood is '{name}', which is not part of this package" in refusal(checkpoint)
    assert not Path("harm").exists()


def test_the_checkpoint_of_another_module_is_refused(tmp_path: Path) -> None:
    class Line(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Linear(1, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(4, 1)))  # pyright: ignore[reportArgumentType]
    trainer.save_checkpoint(tmp_path / "line.ckpt")
    message = refusal(tmp_path / "line.ckpt")
    assert "is a Lightning checkpoint, but not of an NVAE; give one that is" in message


def test_weights_of_another_shape_are_refused(checkpoint: Path) -> None:
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    name = "model.encoder.stem.bias"
    change(checkpoint, state_dict={**weights, name: torch.zeros(5)})
    assert "size mismatch for encoder.stem.bias" in refusal(checkpoint)
    change(checkpoint, state_dict={**weights, name: "text"})
    assert '"encoder.stem.bias", expected torch.Tensor' in refusal(checkpoint)
    change(checkpoint, state_dict={n: value for n, value in weights.items() if n != name})
    assert 'Missing key(s) in state_dict: "encoder.stem.bias"' in refusal(checkpoint)
    change(checkpoint, state_dict={**weights, "model.extra": torch.zeros(1)})
    assert 'Unexpected key(s) in state_dict: "extra"' in refusal(checkpoint)
    change(checkpoint, state_dict={**weights, "other.extra": torch.zeros(1)})
    assert torch.equal(load_model(checkpoint).state_dict()["encoder.stem.bias"], weights[name])


def test_a_description_of_another_model_is_refused(checkpoint: Path) -> None:
    architecture = torch.load(checkpoint, weights_only=True)["architecture"]
    for changes, message in (
        ({"num_flows": 1}, "Missing key(s)"),
        ({"num_flows": -1}, "model.num_flows must be at least 0, got -1"),
        ({"image": {"channels": 3}}, "not the description of a model"),
        ({"encoder_cell": None}, "encoder_cell"),
    ):
        change(checkpoint, architecture={**architecture, **changes})
        assert message in refusal(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": KeyError}, "but not of an NVAE"),
        ({"architecture": None}, "not the description of a model"),
        ({"architecture": []}, "not the description of a model"),
        ({"architecture": "RegularCell"}, "not the description of a model"),
        ({"architecture": {}}, "not the description of a model"),
        ({"state_dict": KeyError}, "but not of an NVAE"),
        ({"state_dict": None}, "but not of an NVAE"),
        ({"state_dict": [1, 2]}, "but not of an NVAE"),
        ({"state_dict": {}}, "Missing key(s)"),
        ({"state_dict": {1: torch.zeros(1), ("a",): 2}}, "Missing key(s)"),
        ({"pytorch-lightning_version": KeyError}, "does not hold the settings ('args')"),
    ],
)
def test_content_that_no_training_writes_is_refused(
    changes: dict[str, Any], message: str, checkpoint: Path
) -> None:
    change(checkpoint, **changes)
    assert message in refusal(checkpoint)


@pytest.mark.parametrize(
    "content",
    [b'{"format": "nvae-lightning"}', b"", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(range(200))],
)
def test_files_of_another_kind_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    assert "is damaged or not a checkpoint" in refusal(path)

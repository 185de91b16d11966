"""Evaluate, sample and score after a training. As a script this file runs commands."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from warm_python import run_python

from nvae_lightning.inference.loading import load_model

EVALUATE = ("evaluate", "num_importance_samples=3", "trainer.limit_test_batches=2", "trainer=cpu")
SAMPLE = ("sample", "recalibration.num_passes=2", "num_samples=3")
SCORE = ("score", "num_importance_samples=2", "trainer.limit_predict_batches=2", "trainer=cpu")
RUN = "ckpt_path=run"


def command(*arguments: str) -> dict[str, Any]:
    """Run one command in this process; return its exit status and last line."""
    name, *overrides = arguments
    sys.argv = [name, *overrides]
    said = io.StringIO()
    status: object = 0
    with contextlib.redirect_stdout(said):
        try:
            from nvae_lightning.cli.command import run

            run(importlib.import_module(f"nvae_lightning.{name}").main)
        except SystemExit as end:
            status = end.code
    return {"status": status, "said": said.getvalue()}


def run_all(folder: Path, *commands: tuple[str, ...]) -> list[dict[str, Any]]:
    """Run commands one after another in one process."""
    result = run_python(__file__, json.dumps(commands), cwd=folder, timeout=600)
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout.splitlines()[-1])
    for one in results:
        one["stderr"] = result.stderr
    return results


def width(picture: Path) -> int:
    """Return the width of a picture."""
    with Image.open(picture) as opened:
        return opened.width


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a short training in ``run`` and a few images in ``images``."""
    folder = tmp_path_factory.mktemp("use")
    (result,) = run_all(
        folder,
        (
            *("train", "dataset=mnist_5k", "model=tiny", "trainer=cpu", "logger=csv"),
            *("trainer.max_steps=4", "hydra.run.dir=run", "num_importance_samples=1"),
            *("trainer.limit_test_batches=1", "trainer.limit_val_batches=1"),
            *("dataset.batch_size=16", "~callbacks.pictures", "~callbacks.kl_per_group"),
        ),
    )
    assert result["status"] == 0, result
    images = folder / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        pixels = generator.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    shutil.copy(images / "0.png", folder / "one.png")
    return folder


MODES = ("prior", "reconstruct", "interpolate", "resample")
EXPORTED = "ckpt_path=exported"

#: Commands in order, by the name of their folder.
COMMANDS = {
    "before": (*EVALUATE, RUN),
    "between": (*SAMPLE, RUN, "temperature=0.5"),
    "after": (*EVALUATE, RUN),
    "other": (*EVALUATE, RUN, "seed=7"),
    "evaluated": (*EVALUATE, RUN, "trainer.limit_test_batches=1"),
    "scored": (
        *(*SCORE, RUN, "images=images", "reference=test", "trainer.limit_predict_batches=1"),
        *("num_importance_samples=3", "k=[1]"),
    ),
    "scores": (*SCORE, RUN, "images=images", "reference=test", "dataset.batch_size=4"),
    **{
        f"{mode}{suffix}": (
            *(*SAMPLE, RUN, f"mode={mode}", "temperature=[0.7,1.0]", seed),
            *(() if mode == "prior" else ("images=images",)),
        )
        for mode in MODES
        for suffix, seed in (("", "seed=0"), ("-again", "seed=0"), ("-seed", "seed=1"))
    },
    "prior-bf16": (
        *(*SAMPLE, RUN, "temperature=[0.7,1.0]", "seed=0"),
        *("trainer.precision=bf16-mixed", "trainer=cpu"),
    ),
    "of_export": (*EVALUATE, EXPORTED, "dataset=mnist_5k", "dataset.batch_size=16"),
    "both": (
        *(*EVALUATE, "ckpt_path=published", "dataset=mnist_5k", "dataset.batch_size=16"),
        "both_likelihoods=true",
    ),
    "one": (*SAMPLE, EXPORTED, "mode=reconstruct", "images=one.png", "num_samples=1"),
}


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """Run all commands; return the last line of each."""
    load_model(folder / "run").save_pretrained(folder / "exported")
    load_model(folder / "run", first_prior_std=1.01).save_pretrained(folder / "published")
    results = run_all(folder, *((*c, f"hydra.run.dir={name}") for name, c in COMMANDS.items()))
    for name, result in zip(COMMANDS, results, strict=True):
        assert result["status"] == 0, (name, result)
    return {name: result["said"] for name, result in zip(COMMANDS, results, strict=True)}


def evaluation(folder: Path, name: str) -> dict[str, Any]:
    """Read the results of an evaluation."""
    return json.loads((folder / name / "evaluation.json").read_text())


def test_sampling_does_not_change_the_evaluation(folder: Path, said: dict[str, str]) -> None:
    before, after = evaluation(folder, "before"), evaluation(folder, "after")
    assert before.pop("seconds") > 0
    assert after.pop("seconds") > 0
    assert before == after
    assert before["num_images"] == 32
    assert before["num_importance_samples"] == 3
    assert len(before["rate_per_group"]) == len(before["active_channels"]) == 4
    assert sum(before["rate_per_group"]) == pytest.approx(before["rate_nats"], rel=1e-5)
    assert before["elbo_nats"] == pytest.approx(
        -before["distortion_nats"] - before["rate_nats"], rel=1e-5
    )
    assert before["nll_bpd"] == pytest.approx(before["nll_nats"] / (784 * np.log(2)), rel=1e-5)
    assert before["nll_standard_error"] > 0
    assert width(folder / "after" / "rate_per_group.png") > 400
    assert "3 importance samples" in said["after"]
    other = evaluation(folder, "other")["nll_nats"]
    assert 0 < abs(other - after["nll_nats"]) < 0.05 * other


def test_evaluation_is_the_mean_of_the_images_scores(folder: Path, said: dict[str, str]) -> None:
    results = evaluation(folder, "evaluated")
    with (folder / "scored" / "reference_scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    nlls = -np.array([float(row["log_likelihood"]) for row in rows])
    assert len(nlls) == results["num_images"] == 16
    # Both use different draws from the same posterior.
    assert nlls.mean() == pytest.approx(results["nll_nats"], rel=0.02)
    error = nlls.std(ddof=1) / np.sqrt(len(nlls))
    assert error == pytest.approx(results["nll_standard_error"], rel=0.2)


def test_scores_name_every_image_and_distinguish_it_from_the_reference(
    folder: Path, said: dict[str, str]
) -> None:
    with (folder / "scores" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{index}.png" for index in range(6)]
    assert list(rows[0]) == ["image", "log_likelihood", "bpd", "llr_1", "llr_2", "llr_3"]
    for row in rows:
        bpd = -float(row["log_likelihood"]) / (784 * np.log(2))
        assert float(row["bpd"]) == pytest.approx(bpd, rel=1e-6)
    areas = json.loads((folder / "scores" / "auroc.json").read_text())
    assert areas["auroc"]["log_likelihood"] == 1.0  # noise against digits
    assert (areas["num_images"], areas["num_reference_images"]) == (6, 8)
    assert "AUROC log_likelihood 1.0000" in said["scores"]
    for name in ("most_and_least_likely", "histograms"):
        assert width(folder / "scores" / f"{name}.png") > 400


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode(folder: Path, said: dict[str, str], mode: str) -> None:
    arrays = [
        np.load(folder / f"{mode}{suffix}" / f"{mode}.npz")["images"]
        for suffix in ("", "-again", "-seed")
    ]
    counts = {"prior": 3, "reconstruct": 6, "interpolate": 3 * 10, "resample": 5 * 4}
    assert arrays[0].shape == (counts[mode], 28, 28, 1)
    assert arrays[0].dtype == np.uint8
    assert np.array_equal(arrays[0], arrays[1])
    assert not np.array_equal(arrays[0], arrays[2])
    assert width(folder / mode / f"{mode}.png") >= 480
    assert f"{counts[mode]} images in" in said[mode]
    kept = sorted(path.name for path in (folder / "run" / "checkpoints").glob("*.safetensors"))
    measured = ("0.5", "0.7-1-bfloat16", "0.7-1")
    assert kept == [f"step0000004.bn-t{one}.safetensors" for one in measured]


def test_samples_in_16_bits_are_close_to_those_in_32(folder: Path, said: dict[str, str]) -> None:
    narrow, wide, other = (
        np.load(folder / f"prior{suffix}" / "prior.npz")["images"].astype(np.float32)
        for suffix in ("-bf16", "", "-seed")
    )
    assert 0.0 < abs(narrow - wide).mean() < 0.1 * abs(other - wide).mean()


def test_an_exported_model_is_used_like_its_run(folder: Path, said: dict[str, str]) -> None:
    of_run, of_export = evaluation(folder, "after"), evaluation(folder, "of_export")
    assert of_run["nll_nats"] == of_export["nll_nats"]
    assert np.load(folder / "one" / "reconstruct.npz")["images"].shape == (2, 28, 28, 1)


def test_published_numerics_and_correct_ones_are_reported_together(
    folder: Path, said: dict[str, str]
) -> None:
    both, own = evaluation(folder, "both"), evaluation(folder, "after")
    assert "corrected" not in own
    # The draws are the same; only their density under the prior differs.
    assert both["corrected"]["nll_nats"] == own["nll_nats"]
    assert both["corrected"]["elbo_nats"] == own["elbo_nats"]
    assert 0 < abs(both["nll_nats"] - own["nll_nats"]) < 1
    assert both["distortion_nats"] == own["distortion_nats"]


@pytest.mark.slow
def test_two_ranks_evaluate_every_image_once(folder: Path) -> None:
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    _, *settings = (*EVALUATE, RUN, "num_importance_samples=10", "trainer.limit_test_batches=1.0")
    for name, more in (("one_rank", ()), ("two_ranks", two)):
        # As a command line, because Lightning starts the second process with it.
        result = subprocess.run(
            [
                *(sys.executable, "-m", "nvae_lightning.evaluate", *settings, *more),
                f"hydra.run.dir={name}",
            ],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
    alone, together = evaluation(folder, "one_rank"), evaluation(folder, "two_ranks")
    assert alone["num_images"] == together["num_images"] == 1000
    assert together["num_devices"] == 2
    # The images are the same; their random binarisation differs.
    for name in ("nll_nats", "elbo_nats", "nll_standard_error"):
        assert together[name] == pytest.approx(alone[name], rel=0.02), name


class Harmful:
    """Object that creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_bad_input_gives_one_line_each(folder: Path) -> None:
    place = folder / "bad"
    place.mkdir()
    shutil.copytree(folder / "run", place / "run")
    shutil.copytree(folder / "images", place / "images")
    load_model(place / "run").save_pretrained(place / "exported")
    content = (place / "run" / "checkpoints" / "last.ckpt").read_bytes()
    (place / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (place / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Harmful()}))
    torch.save({"pytorch-lightning_version": "2", "state_dict": {}}, place / "foreign.ckpt")
    (place / "empty").mkdir()
    (place / "note.txt").write_text("no image")
    (place / "broken.png").write_bytes((place / "images" / "0.png").read_bytes()[:300])
    cases = [
        (("evaluate",), "ckpt_path"),
        (("evaluate", "ckpt_path=gone.ckpt"), "'gone.ckpt' does not exist"),
        (("evaluate", "ckpt_path=cut.ckpt"), "damaged"),
        (("evaluate", "ckpt_path=evil.ckpt"), "nothing in it was run"),
        (("evaluate", "ckpt_path=foreign.ckpt"), "not of an NVAE"),
        (("evaluate", "ckpt_path=note.txt"), "not a checkpoint"),
        (("evaluate", "ckpt_path=empty"), "no intact checkpoint"),
        (
            ("evaluate", RUN, "num_importance_samples=0"),
            "num_importance_samples must be an integer",
        ),
        (("evaluate", RUN, "num_importance_samples=many"), "num_importance_samples: got 'many'"),
        (("evaluate", RUN, "memory_budget=1"), "memory_budget must be at least"),
        (("evaluate", RUN, "dataset=cifar10"), "the model is for Image(channels=1"),
        (("evaluate", RUN, "fid=inception"), "fid.weights"),
        (("sample", RUN, "num_samples=0"), "num_samples must be an integer of at least 1, got 0"),
        (("sample", RUN, "temperature=-0.5"), "temperature must be finite and not negative"),
        (("sample", RUN, "temperature=[1.0]"), "one for each of 2 scales"),
        (("sample", RUN, "temperature=hot"), "temperature: got 'hot'"),
        (("sample", RUN, "mode=paint"), "Could not find 'mode/paint'"),
        (("sample", RUN, "mode=resample", "mode.keep=[5]", "recalibrate_bn=false"), "4 groups"),
        (("sample", RUN, "mode=reconstruct", "images=gone"), "does not exist"),
        (("sample", RUN, "mode=reconstruct", "images=note.txt"), "no images in"),
        (("sample", RUN, "mode=reconstruct", "images=broken.png", "num_samples=1"), "broken.png"),
        (
            ("sample", RUN, "mode=reconstruct", "images=images", "num_samples=7"),
            "there are only 6",
        ),
        (("sample", RUN, "trainer.precision=bf16-true"), "32-true, bf16-mixed, 16-mixed"),
        (("sample", RUN, "trainer=cpu", "trainer.precision=16-mixed"), "precision: got 16-mixed"),
        (("evaluate", RUN, "trainer=cpu", "trainer.precision=16-mixed"), "requires a CUDA GPU"),
        (("sample", RUN, "trainer=cpu", "mode.cuda_graphs=true"), "cuda_graphs: got true, but"),
        (("sample", RUN, "mode.cuda_graphs=maybe"), "cuda_graphs"),
        (("sample", RUN, "trainer.accelerator=abacus"), "abacus"),
        (("sample", RUN, "mode=resample", "mode.keep=3"), "write mode.keep=[3]"),
        (("sample", RUN, "seed=-1"), "seed must be at least 0"),
        (("evaluate", RUN, "trainer.limit_test_batches=0"), "leaves no batch to evaluate"),
        (("score", RUN, "images=images", "trainer.limit_predict_batches=0"), "no batch to score"),
        (
            ("score", RUN, "images=images", "trainer=cpu", "trainer.devices=2"),
            "trainer.devices: got 2 in all",
        ),
        (("score", RUN, "images=test"), "does not exist"),
        (("score", RUN, "images=empty"), "no images in"),
        (
            ("score", RUN, "images=images", "k=[4]"),
            "k: got 4, but at least one of the model's 4 groups",
        ),
        (("score", RUN, "images=images", "k=2"), "write k=[2]"),
        (("score", RUN), "images"),
        (("evaluate", EXPORTED), "add dataset=NAME"),
    ]
    results = run_all(place, *(arguments for arguments, _ in cases))
    for (arguments, message), result in zip(cases, results, strict=True):
        assert isinstance(result["status"], str), (arguments, result)
        assert result["status"].startswith("error: "), (arguments, result)
        assert message in result["status"], (arguments, result)
        assert "\n" not in result["status"], arguments
    assert not (place / "harm").exists()


def test_a_notebook_needs_five_lines(folder: Path) -> None:
    model = load_model(folder / "run" / "checkpoints" / "last.ckpt")
    x: Tensor = model.sample(2, temperature=0.7).sample()
    nats = model.log_likelihood(x, num_samples=5)
    assert nats.shape == (2,)
    assert nats.isfinite().all()


if __name__ == "__main__":
    print(json.dumps([command(*arguments) for arguments in json.loads(sys.argv[1])]))

"""Skipped steps, rollbacks and the end of a diverged training."""

import copy
import csv
import re
from collections.abc import Callable
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from nvae_lightning.data import Image as ImageFormat
from nvae_lightning.data import ImageDataModule
from nvae_lightning.data.readers import ArraySource, Splits
from nvae_lightning.model import RegularCell
from nvae_lightning.objective import KL, Penalty, constant, size_factor
from nvae_lightning.serialization.checkpoints import read_checkpoint
from nvae_lightning.training.callbacks import Checkpoint, Guard
from nvae_lightning.training.callbacks.guard import DivergedError
from nvae_lightning.training.csv_logger import ResumableCSVLogger
from nvae_lightning.training.module import NVAEModule

BATCH = 4
Steps = Callable[[int], bool]


class Noise(ImageDataModule):
    """Random colour images, with a NaN in the batches that `bad` selects."""

    bad: Steps = staticmethod(lambda batch: False)
    num_batches = 0

    @cached_property
    def _sources(self) -> Splits:
        images = np.random.default_rng(0).integers(0, 256, (160, 8, 8, 3), dtype=np.uint8)
        return Splits("noise", {"train": ArraySource(images), "test": ArraySource(images[:4])})

    def to_input(self, batch: Tensor, *, train: bool) -> Tensor:
        images = super().to_input(batch, train=train).clone()
        if self.bad(self.num_batches):
            images[0, 0, 0, 0] = torch.nan
        self.num_batches += 1
        return images


class BadGradient(Callback):
    """Multiply the gradient of one parameter before the guard sees it."""

    def __init__(self, bad: Steps, factor: float, on_rank: int | None = None) -> None:
        self.bad = bad
        self.factor = factor
        self.on_rank = on_rank

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.bad(trainer.global_step) and self.on_rank in (None, trainer.global_rank):
            pl_module.model.encoder.stem.weight.grad.mul_(self.factor)


class Recorder(Callback):
    """Record after every step the state that a skipped step must not change."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.states: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        (optimizer,) = trainer.optimizers
        state = {
            "weights": dict(pl_module.named_parameters()),
            "statistics": {n: b for n, b in pl_module.named_buffers() if ".running_" in n},
            "optimizer": optimizer.state_dict()["state"],
            "logged": dict(trainer.callback_metrics),
            "num_skipped": self.guard.num_skipped,
            "rate": optimizer.param_groups[0]["lr"],
        }
        self.states.append(copy.deepcopy(state))


class Run:
    """One short training with a guard."""

    def __init__(self, folder: Path, build_nvae: Any, **settings: Any) -> None:
        self.folder = folder
        self.guard = Guard(**settings)
        self.logger: CSVLogger | bool = False
        self.recorder = Recorder(self.guard)
        self.module = NVAEModule(
            build_nvae(),
            kl=KL(beta=constant, size_factor=size_factor),
            penalty=Penalty(weight=0.01),
            optimizer=partial(torch.optim.Adamax, lr=1e-3, eps=1e-3),
            final_learning_rate=1e-3,
            warmup_epochs=0,
        )

    def __call__(
        self,
        num_steps: int,
        bad_images: Steps = lambda batch: False,
        *callbacks: Callback,
        save_every: int = 100,
        **trainer: Any,
    ) -> list[dict[str, Any]]:
        data = Noise(batch_size=BATCH, image=ImageFormat(3, 8, 8))
        data.bad = bad_images
        checkpoint = Checkpoint(str(self.folder), every_n_train_steps=save_every, keep=9)
        self.trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=num_steps, log_every_n_steps=1,
            callbacks=[*callbacks, self.guard, self.recorder, checkpoint], logger=self.logger,
            default_root_dir=self.folder, enable_progress_bar=False, limit_val_batches=0,
            enable_model_summary=False, **trainer,
        )  # fmt: skip
        torch.manual_seed(1)
        self.trainer.fit(self.module, data)
        return self.recorder.states


@pytest.fixture
def run(tmp_path: Path, build_nvae: Any) -> Callable[..., Run]:
    return partial(Run, tmp_path, build_nvae)


def assert_equal(first: Any, second: Any, *names: str) -> None:
    for name in names or ("weights", "statistics", "optimizer"):
        torch.testing.assert_close(first[name], second[name], rtol=0.0, atol=0.0)


def moved(first: Any, second: Any) -> bool:
    return any(not torch.equal(w, second["weights"][n]) for n, w in first["weights"].items())


def is_finite(state: Any) -> bool:
    tensors = [*state["weights"].values(), *state["statistics"].values()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_the_guard_does_not_change_a_finite_training(run: Any) -> None:
    torch.manual_seed(1)
    run1 = run(max_grad_norm=1e9)
    torch.manual_seed(1)
    run2 = run()
    run2.guard.on_before_optimizer_step = lambda *_: None
    guarded, plain = run1(4), run2(4)
    assert_equal(guarded[-1], plain[-1])
    assert guarded[-1]["num_skipped"] == 0
    assert guarded[-1]["logged"]["train/skipped_steps"] == 0


def test_a_nan_in_an_image_skips_the_step_and_nothing_else(run: Any) -> None:
    with pytest.warns(UserWarning, match="step 2 skipped: KL of group"):
        states = run()(4, lambda batch: batch == 2)
    assert_equal(states[2], states[1])
    assert moved(states[1], states[0])
    assert moved(states[3], states[2])
    assert is_finite(states[3])
    assert [state["num_skipped"] for state in states] == [0, 0, 1, 1]
    assert [float(s["logged"]["train/skipped_steps"]) for s in states] == [0, 0, 1, 1]


def test_a_nan_in_the_very_first_image_skips_the_step(run: Any) -> None:
    with pytest.warns(UserWarning, match="step 0 skipped"):
        states = run()(2, lambda batch: batch == 0)
    assert all(bool((b == 0).all() or (b == 1).all()) for b in states[0]["statistics"].values())
    assert not states[0]["optimizer"]
    assert is_finite(states[1])
    assert moved(states[1], states[0])


def test_a_nan_in_a_gradient_skips_the_step_and_names_the_parameter(run: Any) -> None:
    with pytest.warns(UserWarning, match=r"step 1 skipped: gradient of model\.encoder\.stem"):
        states = run()(3, lambda _: False, BadGradient(lambda step: step == 1, torch.nan))
    assert_equal(states[1], states[0])
    assert moved(states[2], states[1])
    assert is_finite(states[2])


def test_a_nan_in_the_first_of_two_micro_batches_skips_their_one_step(run: Any) -> None:
    with pytest.warns(UserWarning, match="step 1 skipped"):
        states = run()(3, lambda batch: batch == 2, accumulate_grad_batches=2)
    assert len(states) == 6
    assert_equal(states[3], states[1])
    assert moved(states[5], states[3])
    assert is_finite(states[5])
    assert states[5]["num_skipped"] == 1


def test_cells_without_batch_normalisation_are_guarded(tmp_path: Path, build_nvae: Any) -> None:
    cell = partial(RegularCell, normalization=nn.Identity, activation=nn.ELU)
    names = ("encoder_cell", "decoder_cell", "preprocess_cell", "postprocess_cell")
    run = Run(tmp_path, partial(build_nvae, **dict.fromkeys(names, cell)))
    with pytest.warns(UserWarning, match="step 1 skipped"):
        states = run(3, lambda batch: batch == 1)
    assert not states[1]["statistics"]
    assert_equal(states[1], states[0])
    assert moved(states[2], states[1])


@pytest.mark.filterwarnings("ignore:step .* rolled back to")
def test_large_gradients_are_skipped_like_nonfinite_ones(run: Any) -> None:
    bad = BadGradient(lambda step: step in (2, 3), 1e9)
    guarded = run(max_grad_norm=1e4, patience=2)
    with pytest.warns(UserWarning, match=r"step [23] skipped: gradient norm .* above 10000"):
        states = guarded(5, lambda _: False, bad, save_every=1)
    made = [moved(state, before) for before, state in pairwise(states)]
    assert made == [True, False, False, True]
    assert guarded.guard.num_rollbacks == 1


@pytest.mark.filterwarnings("ignore:step .* skipped")
def test_too_many_skipped_steps_roll_back_and_the_training_continues(run: Any) -> None:
    guarded = run(patience=3, penalty_factor=3.0, learning_rate_factor=0.25)
    # Checkpoints at 2 and 4; none at 6, because steps 5, 6 and 7 are skipped.
    expected = r"step 8: rolled back to '.*step0000004.ckpt' after 3 .*; λ is now 3 .* rate 0.25 "
    with pytest.warns(UserWarning, match=expected):
        states = guarded(10, lambda batch: batch in (5, 6, 7), save_every=2)
    saved = read_checkpoint(guarded.folder / "step0000004.ckpt")
    assert not (guarded.folder / "step0000006.ckpt").exists()
    for name, value in states[7]["weights"].items():
        assert torch.equal(value, saved["state_dict"][name])
    for name, value in states[7]["statistics"].items():
        assert torch.equal(value, saved["state_dict"][name])
    torch.testing.assert_close(
        states[7]["optimizer"], saved["optimizer_states"][0]["state"], rtol=0.0, atol=0.0
    )
    assert moved(states[4], states[7])
    assert moved(states[8], states[7])
    assert is_finite(states[9])
    assert guarded.module.penalty_factor == 3.0
    assert guarded.module.learning_rate_factor == 0.25
    assert guarded.guard.num_rollbacks == 1
    assert guarded.trainer.global_step == 10
    assert states[8]["logged"]["train/rollbacks"] == 1
    # From the next step on.
    assert [round(state["rate"], 9) for state in states[6:]] == [1e-3] + 3 * [2.5e-4]
    after = read_checkpoint(guarded.folder / "step0000010.ckpt")
    assert after["factors"] == {"penalty": 3.0, "learning_rate": 0.25}


@pytest.mark.filterwarnings("ignore:step .* skipped")
@pytest.mark.filterwarnings("ignore:step .* rolled back to")
def test_a_rollback_does_not_use_a_checkpoint_made_while_steps_were_skipped(run: Any) -> None:
    guarded = run(patience=3)
    bad = (*range(5, 8), *range(9, 12))
    states = guarded(12, lambda batch: batch in bad, save_every=4)
    assert guarded.guard.num_rollbacks == 2
    first = read_checkpoint(guarded.folder / "step0000004.ckpt")
    saved = read_checkpoint(guarded.folder / "step0000008.ckpt")  # after the first rollback
    for name, value in states[11]["weights"].items():
        assert torch.equal(value, saved["state_dict"][name])
        assert torch.equal(value, first["state_dict"][name])


@pytest.mark.filterwarnings("ignore:step .* skipped")
@pytest.mark.filterwarnings("ignore:step .* rolled back to")
@pytest.mark.parametrize("where", ["image", "gradient"])
def test_a_training_that_never_recovers_ends_with_the_reason(run: Any, where: str) -> None:
    guarded = run(patience=2, max_rollbacks=2)
    place = {"image": r"KL of groups 0, 1, 2, distortion", "gradient": r"model\.encoder\.stem"}
    gradient = BadGradient(lambda step: where == "gradient" and step >= 3, torch.nan)
    with pytest.raises(DivergedError, match=place[where]) as raised:
        guarded(20, lambda batch: where == "image" and batch >= 3, gradient, save_every=2)
    message = str(raised.value)
    assert "\n" not in message
    assert "2 steps in a row were skipped up to step 9, after 2 rollbacks" in message
    for remedy in ("penalty.weight", "optimizer.lr", "trainer.precision", "max_grad_norm"):
        assert remedy in message
    assert guarded.module.penalty_factor == 4.0
    assert guarded.module.learning_rate_factor == 0.25
    assert is_finite(guarded.recorder.states[-1])


@pytest.mark.filterwarnings("ignore:step .* skipped")
def test_a_training_without_a_checkpoint_ends_with_the_reason(run: Any) -> None:
    with pytest.raises(DivergedError, match="before the first checkpoint; seen: KL of groups"):
        run(patience=2)(9, lambda batch: True)


@pytest.mark.filterwarnings("ignore:step .* skipped")
@pytest.mark.parametrize("diverges", [True, False])
def test_the_divergence_is_logged(run: Any, tmp_path: Path, diverges: bool) -> None:
    guarded = run(patience=1, max_rollbacks=0)
    guarded.logger = ResumableCSVLogger(str(tmp_path))
    if diverges:
        with pytest.raises(DivergedError, match="up to step 4, after 0 rollbacks"):
            guarded(6, lambda batch: batch >= 3)
    else:
        guarded(6)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    said = [(row["step"], row["train/diverged"]) for row in rows if row.get("train/diverged")]
    assert said == ([("3", "1.0")] if diverges else [])


@pytest.mark.filterwarnings("ignore:step .* skipped")
@pytest.mark.filterwarnings("ignore:ckpt_path.* is damaged .*another one is used")
def test_a_rollback_skips_a_damaged_checkpoint(run: Any) -> None:
    guarded = run(patience=2)

    class Damage(Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 5:
                (guarded.folder / "step0000004.ckpt").write_bytes(b"PK")

    with pytest.warns(UserWarning, match=r"rolled back to '.*step0000002.ckpt'"):
        guarded(8, lambda batch: batch in (5, 6), Damage(), save_every=2)


@pytest.mark.filterwarnings("ignore:step .* skipped")
def test_counts_survive_a_resume(run: Any) -> None:
    guarded = run(patience=3)
    guarded(3, lambda batch: batch in (1, 2))
    saved = read_checkpoint(guarded.folder / "step0000003.ckpt")
    resumed = Guard()
    resumed.load_state_dict(saved["callbacks"][resumed.state_key])
    assert resumed.num_skipped == 2
    assert resumed.state_dict() == guarded.guard.state_dict()
    resumed.num_skipped += 1
    assert resumed.state_dict() != guarded.guard.state_dict()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_grad_norm", 0),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", float("nan")),
        ("patience", 0),
        ("patience", True),
        ("max_rollbacks", -1),
        ("penalty_factor", 0.5),
        ("learning_rate_factor", 0.0),
        ("learning_rate_factor", 1.5),
    ],
)
def test_a_number_out_of_range_is_refused(setting: str, value: Any) -> None:
    name = f"callbacks.guard.{setting}"
    expected = f"{re.escape(name)} must be .*, got {value!r}"
    with pytest.raises(ValueError, match=expected) as raised:
        Guard(**{setting: value})
    assert "\n" not in str(raised.value)

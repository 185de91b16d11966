"""NVAEModule in plain Lightning, without a config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nvae_lightning.model import NVAE
from nvae_lightning.objective import KL, Penalty, constant, kl_warmup, size_factor
from nvae_lightning.training.module import NVAEModule

BuildNVAE = Callable[..., NVAE]
PLAIN: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False,
    "enable_model_summary": False, "log_every_n_steps": 1,
}  # fmt: skip


def images(count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 8, 8), generator=generator) / 255


def loader(x: Any, *labels: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, *labels) if labels else x, batch_size=4)


def labelled() -> DataLoader[Any]:
    return loader(images(), torch.arange(8))


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False}
    return Trainer(default_root_dir=folder, **{**PLAIN, **quiet, "max_epochs": 1, **settings})


@pytest.fixture(scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.fixture
def checkpoint(_cache: Path, build_nvae: BuildNVAE) -> Path:
    """Checkpoint of a plain training, with Lightning's own logger and ModelCheckpoint."""
    path = _cache / "last.ckpt"
    if not path.exists():
        saving = ModelCheckpoint(_cache, filename="last", monitor="val/bpd", mode="min")
        plain = trainer(
            _cache, logger=True, enable_checkpointing=True, gradient_clip_val=1.0,
            callbacks=[saving, EarlyStopping("val/bpd")],
        )  # fmt: skip
        plain.fit(NVAEModule(build_nvae()), labelled(), labelled())
        assert plain.global_step == 2
    return path


def bound(module: NVAEModule, folder: Path) -> float:
    torch.manual_seed(1)
    (metrics,) = trainer(folder).validate(module, labelled(), verbose=False)
    return metrics["val/elbo"]


def test_the_defaults_match_the_paper(build_nvae: BuildNVAE) -> None:
    module = NVAEModule(build_nvae())
    optimizer = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.Adamax)
    expected = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 3e-4}
    assert {name: optimizer.defaults[name] for name in expected} == expected
    assert module.kl == KL(beta=kl_warmup, size_factor=size_factor)
    assert module.penalty == Penalty(weight=0.01, initial_weight=None, spectral=True)
    assert (module.final_learning_rate, module.warmup_epochs) == (1e-4, 5)


def test_a_checkpoint_is_loaded_without_further_arguments(
    checkpoint: Path, tmp_path: Path
) -> None:
    module = NVAEModule.load_from_checkpoint(checkpoint)
    content = torch.load(checkpoint, weights_only=True)
    assert module.state_dict().keys() == content["state_dict"].keys()
    for name, value in module.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(value, content["state_dict"][name])
    assert bound(module, tmp_path) == bound(NVAEModule.load_from_checkpoint(checkpoint), tmp_path)
    assert bound(module, tmp_path) == bound(NVAEModule(module.model), tmp_path)


def test_the_objective_is_loaded_from_a_checkpoint(build_nvae: BuildNVAE, tmp_path: Path) -> None:
    own = NVAEModule(
        build_nvae(),
        kl=KL(beta=partial(constant, value=0.5), size_factor=None),
        penalty=Penalty(weight=0.1, initial_weight=1.0, spectral=False),
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1),
        final_learning_rate=1e-3, warmup_epochs=0.5, num_importance_samples=3,
    )  # fmt: skip
    plain = trainer(tmp_path)
    plain.fit(own, labelled(), labelled())
    plain.save_checkpoint(tmp_path / "own.ckpt", weights_only=False)
    again = NVAEModule.load_from_checkpoint(tmp_path / "own.ckpt")
    assert again.kl.size_factor is None
    assert again.kl.beta(1, 2) == 0.5
    assert again.penalty == own.penalty
    assert isinstance(again.optimizer, partial)
    assert again.optimizer.func is torch.optim.AdamW
    assert again.optimizer.keywords == {"lr": 2e-3, "weight_decay": 0.1}
    assert (again.final_learning_rate, again.warmup_epochs) == (1e-3, 0.5)
    assert again.num_importance_samples == 3
    given = NVAEModule.load_from_checkpoint(tmp_path / "own.ckpt", penalty=Penalty())
    assert given.penalty == Penalty()


def change(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    for name, value in changes.items():
        content.pop(name) if value is None else content.update({name: value})
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_a_checkpoint_of_an_earlier_version_gets_the_defaults(
    checkpoint: Path, tmp_path: Path
) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    state = {name: value for name, value in state.items() if name.startswith("model.")}
    old = change(checkpoint, tmp_path, hyperparameters=None, state_dict=state)
    assert NVAEModule.load_from_checkpoint(old).penalty == Penalty()


def test_unknown_constructors_in_a_checkpoint_are_not_called(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    harmful = {"optimizer": {"constructor": "os.system", "command": "mkdir harm"}}
    path = change(checkpoint, tmp_path, hyperparameters=harmful)
    with pytest.raises(ValueError, match=r"optimizer is 'os\.system', .* pass it as optimizer="):
        NVAEModule.load_from_checkpoint(path)
    NVAEModule.load_from_checkpoint(path, optimizer=torch.optim.SGD)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": None}, "not the checkpoint of an NVAE's training"),
        ({"hyperparameters": 3}, "not the description of a training"),
        ({"hyperparameters": {"kl": 3}}, "not the description of a training"),
        ({"hyperparameters": {"warmup_epochs": -1}}, "module.warmup_epochs must be at least 0"),
        ({"state_dict": {}}, "Missing key"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    changes: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        NVAEModule.load_from_checkpoint(change(checkpoint, tmp_path, **changes))
    assert "changed.ckpt" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, grey_nvae: NVAE) -> None:
    with pytest.raises(ValueError, match="its weights belong to another model") as error:
        NVAEModule.load_from_checkpoint(checkpoint, model=grey_nvae)
    assert "\n" not in str(error.value)


def test_prediction_is_the_log_likelihood_of_each_image(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = NVAEModule.load_from_checkpoint(checkpoint, num_importance_samples=2)
    expected: list[Tensor] = []
    log_likelihood = module.model.log_likelihood

    def record(*arguments: Any, **settings: Any) -> Tensor:
        expected.append(log_likelihood(*arguments, **settings))
        return expected[-1]

    monkeypatch.setattr(module.model, "log_likelihood", record)
    found: Any = trainer(tmp_path).predict(module, labelled())
    assert torch.equal(torch.cat(found), torch.cat(expected))
    assert torch.cat(found).shape == (8,)


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True},
        {"overfit_batches": 1},
        {"limit_train_batches": 1, "limit_val_batches": 0},
        {"accumulate_grad_batches": 2, "precision": "bf16-mixed"},
        {"profiler": "simple", "precision": "bf16-true"},
        {"max_epochs": None, "max_steps": 1},
    ],
    ids=str,
)
def test_settings_of_the_trainer_work(
    settings: dict[str, Any], build_nvae: BuildNVAE, tmp_path: Path
) -> None:
    trainer(tmp_path, **settings).fit(NVAEModule(build_nvae()), labelled(), labelled())


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(images())


def test_training_on_data_without_a_length(build_nvae: BuildNVAE, tmp_path: Path) -> None:
    plain = trainer(tmp_path, max_epochs=None, max_steps=3, limit_val_batches=0)
    plain.fit(NVAEModule(build_nvae()), loader(Stream()), loader(Stream()))
    assert plain.global_step == 3


def test_each_of_several_loaders_is_measured(build_nvae: BuildNVAE, tmp_path: Path) -> None:
    module, plain = NVAEModule(build_nvae()), trainer(tmp_path)
    plain.test(module, [labelled(), loader(images()[:4])], verbose=False)
    assert {"test/elbo/dataloader_idx_0", "test/nll/dataloader_idx_1"} <= {*plain.callback_metrics}
    for suffix, count in (("", 12), ("/dataloader_idx_0", 8), ("/dataloader_idx_1", 4)):
        assert plain.callback_metrics[f"test/num_images{suffix}"] == count


# --- unsuitable images --------------------------------------------------------------------

WRONG = {
    "bytes": (lambda x: (255 * x).byte(), "got dtype torch.uint8, .* pass x / 255"),
    "integers": (lambda x: (255 * x).long(), "got dtype torch.int64"),
    "to_255": (lambda x: 255 * x, "got values from 0 to 255, .* divide them by 255"),
    "signed": (lambda x: 2 * x - 1, r"got values from -1 to 1, .* for example by \(x \+ 1\) / 2"),
    "bright": (lambda x: 1.5 * x, r"got values from 0 to 1.5, .* x\.clamp"),
    "normalised": (lambda x: (x - 0.45) / 0.2, r"got values from -2.25 to 2.7\d*, .*Normalize"),
    "nan": (lambda x: torch.where(x > 0.9, torch.nan, x), "not finite"),
    "between": (lambda x: 0.7 * x, "got values between the 256 levels k / 255 .* quantise"),
    "last": (lambda x: x.permute(0, 2, 3, 1), r"come last: pass x.permute\(0, 3, 1, 2\)"),
    "channel": (lambda x: x[:, :1], r"\(channel, height, width\) \(3, 8, 8\); convert"),
    "size": (lambda x: x.repeat(1, 1, 2, 2), "for images of .* crop and resize the images"),
    "dimensions": (lambda x: x[:, 0], r"a batch of shape \(\d, 8, 8\), but the model is for"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        *(("train", kind) for kind in WRONG),
        *((stage, kind) for stage in ("val", "test", "predict") for kind in ("to_255", "last")),
    ],
)
def test_wrong_images_are_refused_in_every_stage(
    stage: str, kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    make, message = WRONG[kind]
    module = NVAEModule.load_from_checkpoint(checkpoint)
    plain = trainer(tmp_path, num_sanity_val_steps=0)
    run = {"train": plain.fit, "val": plain.validate, "test": plain.test, "predict": plain.predict}
    data = (loader(make(images())),) * (2 if stage == "train" else 1)
    with pytest.raises(ValueError, match=f"{stage} images: .*{message}") as error:
        run[stage](module, *data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_images_are_refused_by_the_model(kind: str, colour_nvae: NVAE) -> None:
    make, message = WRONG[kind]
    x = make(images(2))
    with pytest.raises(ValueError, match=f"^images: .*{message}"):
        colour_nvae.log_likelihood(x, num_samples=1)
    if kind != "between":  # inference accepts any levels
        for infer in (colour_nvae, colour_nvae.encode):
            with pytest.raises(ValueError, match=f"^images: .*{message}"):
                infer(x)


def test_grey_values_are_refused_by_a_bernoulli_likelihood(
    grey_nvae: NVAE, tmp_path: Path
) -> None:
    grey = torch.rand(4, 1, 6, 6)
    with pytest.raises(ValueError, match=r"zeros and ones only; binarise them with"):
        trainer(tmp_path).test(NVAEModule(grey_nvae), loader(grey))
    assert grey_nvae.log_likelihood(grey.round(), 1).isfinite().all()


def test_levels_of_sixteen_bits_and_of_arithmetic_are_accepted(colour_nvae: NVAE) -> None:
    x = images(2)
    colour_nvae.log_likelihood(
        (x - 0.5) / 0.5 * 0.5 + 0.5, 1
    )  # like transforms.Normalize and back
    colour_nvae.check_images(x.half())
    colour_nvae.check_images(x.bfloat16())
    with pytest.raises(ValueError, match=r"float64, but the weights have .*float32"):
        colour_nvae.log_likelihood(x.double(), 1)


@pytest.mark.parametrize("make", [lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: (x,)])
def test_labels_are_ignored(make: Any, checkpoint: Path) -> None:
    module = NVAEModule.load_from_checkpoint(checkpoint).eval()
    torch.manual_seed(1)
    alone = module.predict_step(images(2), 0)
    torch.manual_seed(1)
    assert torch.equal(alone, module.predict_step(make(images(2), torch.arange(2)), 0))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": torch.zeros(1), "label": 0}, "got a dict, but"),
        ((), "got a tuple, but"),
        (("name", torch.zeros(1)), "got a tuple, but"),
        (None, "got a NoneType, but"),
    ],
)
def test_other_batches_are_refused(batch: Any, message: str, checkpoint: Path) -> None:
    module = NVAEModule.load_from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=re.escape(f"batch: {message}")):
        module.validation_step(batch, 0)


def test_values_are_checked_in_the_first_batch_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = NVAEModule.load_from_checkpoint(checkpoint)
    checked: list[str] = []
    look = module.model.check_images

    def check(x: Tensor, *, name: str = "images", **settings: Any) -> None:
        checked.append(name)
        look(x, name=name, **settings)

    monkeypatch.setattr(module.model, "check_images", check)
    trainer(tmp_path, max_epochs=2).fit(module, labelled(), labelled())
    assert sorted(set(checked)) == ["train images", "val images"]
    assert len(checked) == 2

"""Every bad setting gives one line that names it, before anything is written."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from warm_python import run_python

# Overrides, and expected words of the one-line error. Wrong types are tested in
# tests/unit/cli/test_setting_types.py.
BAD_SETTINGS = [
    # Groups and keys that do not exist.
    ("model=huge", "model/huge", "tiny"),
    ("kl=foo", "kl/foo", "balanced"),
    ("penalty=foo", "penalty/foo", "spectral"),
    ("optimizer=sgd", "optimizer/sgd", "adamax"),
    ("trainer=tpu", "trainer/tpu", "cpu"),
    ("logger=foo", "logger/foo", "csv"),
    ("callbacks=foo", "callbacks/foo", "ema"),
    ("launcher=foo", "launcher/foo", "joblib"),
    ("experiment=foo", "experiment/foo", "table2"),
    ("dataset=mnist5000", "dataset/mnist5000", "mnist_5k"),
    ("recipe=gauss", "recipe/gauss", "published"),
    ("model/cell@model.encoder_cell=foo", "model/cell/foo", "regular"),
    ("dataset.rot=data", "dataset.rot"),
    ("foo=1", "foo"),
    ("+trainer.foo=1", "trainer.foo"),
    ("+dataset.foo=1", "dataset.foo"),
    ("model._target_=nvae_lightning.model.VAE", "nvae_lightning.model.VAE"),
    ("~recipe.learning_rate", "recipe.learning_rate"),
    ("batch_size", "batch_size"),
    ("dataset.batch_size=[1,", "[1,"),
    # The run.
    ("seed=-1", "seed", "-1"),
    ("seed=4294967296", "seed", "4294967296"),
    ("compile=maybe", "compile", "'maybe'", "a valid boolean"),
    ("compile=null", "compile", "null"),
    ("compile=1", "compile", "1"),
    ("cuda_graphs=maybe", "cuda_graphs", "'maybe'", "a valid boolean"),
    ("num_importance_samples=0", "num_importance_samples", "0"),
    ("num_importance_samples=2.5", "num_importance_samples", "2.5"),
    ("num_importance_samples=???", "num_importance_samples"),
    ("ckpt_path=nowhere.ckpt", "ckpt_path", "nowhere.ckpt"),
    ("ckpt_path=last", "ckpt_path=last", "hydra.run.dir"),
    ("ckpt_path=good", "ckpt_path", "good"),
    ("ckpt_path=empty.ckpt", "ckpt_path", "empty.ckpt"),
    ("ckpt_path=cut.ckpt", "ckpt_path", "cut.ckpt"),
    ("ckpt_path=other.ckpt", "ckpt_path", "other.ckpt"),
    ("ckpt_path=5", "ckpt_path", "5"),
    ("ckpt_path=[last]", "ckpt_path", "['last']"),
    # The trainer.
    ("trainer.max_steps=0", "trainer.max_steps", "0"),
    ("trainer.max_steps=-5", "max_steps", "-5"),
    ("trainer.max_epochs=-2", "max_epochs", "-2"),
    ("trainer.max_epochs=0", "trainer.max_epochs", "0"),
    ("trainer.max_epochs=-1", "trainer.max_epochs", "-1"),
    ("trainer.devices=0", "devices", "0"),
    ("trainer.devices=foo", "devices", "foo"),
    ("trainer.devices=-2", "devices", "-2"),
    ("trainer.num_nodes=0", "num_nodes", "0"),
    ("trainer.timeout_minutes=0", "trainer.timeout_minutes", "0"),
    ("trainer.precision=16-mixed", "trainer.precision", "16-mixed", "bf16-mixed"),
    ("trainer.accelerator=foo", "accelerator", "foo"),
    ("trainer.accelerator=tpu", "accelerator", "tpu"),
    ("trainer.strategy=foo", "strategy", "foo"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches", "0"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch", "0"),
    ("trainer.limit_train_batches=-1", "limit_train_batches", "-1"),
    ("trainer.limit_test_batches=1.5", "limit_test_batches", "1.5"),
    ("+trainer.max_time=soon", "max_time", "soon"),
    ("trainer.profiler=foo", "profiler", "foo"),
    # The optimiser.
    ("optimizer.lr=0", "optimizer.lr", "0"),
    ("optimizer.lr=-1", "optimizer.lr", "-1"),
    ("optimizer.betas=[0.9,1.0]", "optimizer.betas", "1.0"),
    ("optimizer.eps=-1", "optimizer.eps", "-1"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay", "-0.1"),
    ("recipe.final_learning_rate=-1", "final_learning_rate", "-1"),
    ("recipe.warmup_epochs=-1", "warmup_epochs", "-1"),
    ("recipe.warmup_epochs=null", "recipe.warmup_epochs", "null"),
    ("recipe.validation_epochs=0", "check_val_every_n_epoch", "0"),
    # The objective.
    ("kl.beta.fraction=-1", "kl.beta.fraction", "-1"),
    ("kl.beta.fraction=2", "kl.beta.fraction", "2"),
    ("kl.beta.constant_fraction=1.5", "kl.beta.constant_fraction", "1.5"),
    ("kl.beta.floor=-1", "kl.beta.floor", "-1"),
    ("kl.size_factor.growth=0", "kl.size_factor.growth", "0"),
    ("kl.size_factor.growth=1e60", "kl.size_factor.growth", "1e+60"),
    ("kl=constant kl.beta.value=-1", "kl.beta.value", "-1"),
    ("kl=constant kl.beta.value=nan", "kl.beta.value", "nan"),
    ("kl=constant kl.size_factor=4", "kl.size_factor", "4"),
    ("penalty.weight=-1", "penalty.weight", "-1"),
    ("penalty.initial_weight=0", "penalty.initial_weight", "0"),
    ("penalty.initial_weight=-1", "penalty.initial_weight", "-1"),
    # Callbacks and loggers.
    ("callbacks.pictures.num_images=1", "callbacks.pictures.num_images", "1"),
    ("callbacks.guard.patience=0", "callbacks.guard.patience", "0"),
    ("callbacks.guard.max_grad_norm=-1", "callbacks.guard.max_grad_norm", "-1"),
    ("callbacks.guard.max_rollbacks=-1", "callbacks.guard.max_rollbacks", "-1"),
    ("callbacks.guard.penalty_factor=0.5", "callbacks.guard.penalty_factor", "0.5"),
    ("callbacks.guard.learning_rate_factor=2", "callbacks.guard.learning_rate_factor", "2"),
    ("callbacks.preemption.check_every_n_steps=0", "callbacks.preemption", "0"),
    ("callbacks.checkpoint.keep=0", "callbacks.checkpoint.keep", "0"),
    ("callbacks.checkpoint.keep=null", "callbacks.checkpoint.keep", "null"),
    ("callbacks.checkpoint.every_n_train_steps=0", "callbacks.checkpoint.every_n", "0"),
    ("callbacks.learning_rate.logging_interval=foo", "logging_interval", "foo"),
    ("callbacks=ema callbacks.ema.decay=1", "callbacks.ema.decay", "1"),
    ("callbacks.guard=5", "callbacks.guard", "5"),
    ("logger=default logger.wandb.offline=maybe", "logger.wandb.offline", "'maybe'"),
    # The model.
    ("model.hierarchy.num_groups=[0,1]", "num_groups", "at least 1", "got 0"),
    ("model.hierarchy.num_groups=[]", "num_groups", "at least one scale"),
    ("model.hierarchy.num_groups=[1,1,1,1,1]", "image.size 28", "must be a multiple of"),
    ("model.hierarchy.channels=0", "channels", "0"),
    ("model.hierarchy.width=0", "width", "0"),
    ("model.hierarchy.width=0.3", "width", "0.3"),
    ("model.hierarchy.downsample=3", "downsample", "3"),
    ("model.hierarchy.downsample=0", "downsample", "0"),
    ("model.hierarchy.max_groups_per_scale=0", "max_groups_per_scale", "0"),
    ("model.hierarchy.latent_channels=0", "latent_channels", "0"),
    ("+model.hierarchy.decoder_channels=0", "decoder_channels", "0"),
    ("model.num_flows=-1", "num_flows", "-1"),
    ("model.num_encoder_cells=0", "model.num_encoder_cells", "0"),
    ("model.num_preprocess_cells=0", "model.num_preprocess_cells", "0"),
    ("+model.first_prior_std=0", "model.first_prior_std", "0"),
    ("model.decoder_cell.kernel_size=4", "kernel_size", "4"),
    ("model.decoder_cell.kernel_size=-1", "kernel_size", "-1"),
    ("model.decoder_cell.expansion=0", "expansion", "0"),
    ("+model.decoder_cell.num_groups=7", "num_groups", "7"),
    ("+model.encoder_cell.dilations=[]", "dilations", "[]"),
    ("+model.encoder_cell.dilations=[0,1]", "dilations", "[0, 1]"),
    ("module.kl=foo", "module.kl", "'foo'"),
    # Data.
    ("dataset.batch_size=0", "dataset.batch_size", "0"),
    ("dataset.batch_size=4001", "dataset.batch_size", "4001", "3600"),
    ("dataset.num_workers=-1", "dataset.num_workers", "-1"),
    ("dataset.image.bits=9", "image.bits", "9", "between 1 and 8"),
    ("dataset.image.bits=8", "Bernoulli", "image.bits=1", "got 8"),
    ("dataset.image.bits=x", "dataset.image.bits", "'x'"),
    ("dataset.image.bits=2", "Bernoulli", "bits=1", "got 2"),
    ("dataset.image.size=0", "image.size", "0"),
    ("dataset.image.size=27", "image.size 27"),
    ("dataset.image.channels=2", "image.channels", "2"),
    ("dataset.image.padding=-1", "image.padding", "-1"),
    ("dataset.image.padding=3", "padded to 34"),
    ("dataset.flip=maybe", "dataset.flip", "'maybe'"),
    ("model.likelihood=gauss", "model.likelihood", "'gauss'"),
    ("dataset=celeba_hq model=large", "dataset.root", "celeba_hq", "CelebA HQ"),
    ("FOLDER dataset.root=good dataset.image.size=27", "image.size 27"),
    ("FOLDER dataset.root=nowhere", "dataset.root", "nowhere"),
    ("FOLDER dataset.root=null", "dataset.root"),
    ("FOLDER dataset.root=5", "dataset.root", "5"),
    ("FOLDER dataset.root=bad", "cannot read", "bad.png"),
    ("FOLDER dataset.root=good", "dataset.batch_size", "32"),
    ("FOLDER dataset.root=good dataset.crop=[1,2]", "dataset.crop", "[1, 2]"),
    ("FOLDER dataset.root=good dataset.crop=[4,0,2,2]", "dataset.crop", "[4, 0, 2, 2]"),
    ("FOLDER dataset.root=good dataset.crop=5", "dataset.crop", "5"),
    ("FOLDER dataset.root=good dataset.crop=[0,0,x,2]", "dataset.crop", "'x'"),
    ("FOLDER dataset.root=good dataset.interpolation=foo", "dataset.interpolation", "'foo'"),
    ("FOLDER dataset.root=good dataset.interpolation=3", "dataset.interpolation", "3"),
    ("FOLDER dataset.root=good dataset.verify=maybe", "dataset.verify", "'maybe'"),
    ("FOLDER dataset.root=good dataset.test_fraction=0", "dataset.test_fraction", "0"),
    ("FOLDER dataset.root=good dataset.test_fraction=1.5", "dataset.test_fraction", "1.5"),
    ("FOLDER dataset.root=good dataset.test_fraction=x", "dataset.test_fraction", "'x'"),
    ("FOLDER dataset.root=good dataset.split_seed=x", "dataset.split_seed", "'x'"),
    ("FOLDER dataset.root=good recipe/published@recipe=mnist", "Bernoulli", "bits=1", "got 8"),
    ("FOLDER dataset.root=good +model.likelihood.num_mixtures=0", "num_mixtures", "0"),
    ("FOLDER dataset.root=good +model.likelihood.num_mixtures=x", "num_mixtures", "'x'"),
    ("FOLDER dataset.root=good dataset.validation_fraction=1", "dataset.validation_fraction", "1"),
    ("COUNTS dataset.check_counts=5", "dataset.check_counts", "5"),
    ("COUNTS", "dataset.check_counts: 1,281,147", "dataset.check_counts=false"),
]  # fmt: skip

if not torch.cuda.is_available():
    BAD_SETTINGS.append(("trainer=gpu", "trainer", "gpu"))

SHORT = {
    "FOLDER": "dataset=image_folder dataset.image.size=16",
    "COUNTS": "dataset=imagenet32 model.hierarchy.max_groups_per_scale=1 dataset.root=good",
}

# One process for all rows: starting Python and importing torch takes longer than any of them.
DRIVER = """
import contextlib, io, json, sys
from nvae_lightning.cli.command import run
from nvae_lightning.train import main
found = []
for overrides in json.loads(sys.argv[1]):
    sys.argv = ["train", *overrides]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            run(main)
        status = 0
    except SystemExit as exit:
        status = exit.code
    except BaseException as error:
        status = repr(error)
    found.append((status, errors.getvalue()))
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_settings")
    for name in ("good", "bad"):
        (folder / name).mkdir()
        for index in range(2):
            Image.new("L", (16, 16)).save(folder / name / f"{index}.png")
    (folder / "bad" / "bad.png").write_bytes(b"\x89PNG, but no more")
    (folder / "empty.ckpt").touch()
    torch.save({"state_dict": {}}, folder / "cut.ckpt")
    whole = (folder / "cut.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], folder / "other.ckpt")
    return folder


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, folder: Path) -> dict[int, tuple[object, str]]:
    """Exit status and errors of the rows to test, by index."""
    tests = [item for item in request.session.items if item.path == request.path]
    indices = [t.callspec.params["index"] for t in tests if hasattr(t, "callspec")]  # pyright: ignore
    overrides = []
    for index in indices:
        settings, *_ = BAD_SETTINGS[index]
        for short, long in SHORT.items():
            settings = settings.replace(short, long)
        given = ["logger=csv", "trainer=cpu", f"hydra.run.dir=run{index}"]
        overrides.append([*given, *settings.split()])
    result = run_python("-c", DRIVER, json.dumps(overrides), cwd=folder, timeout=600)
    assert result.returncode == 0, result.stderr
    return dict(zip(indices, json.loads(result.stdout.partition("FOUND")[2]), strict=True))


# Every fourth row runs by default: most others exercise the same checks with other names.
ROWS = [
    pytest.param(index, id=row[0], marks=() if index % 4 == 0 else pytest.mark.slow)
    for index, row in enumerate(BAD_SETTINGS)
]


@pytest.mark.parametrize("index", ROWS)
def test_a_bad_setting_gives_one_line_before_anything_is_written(
    index: int, found: dict[int, tuple[object, str]], folder: Path
) -> None:
    _, *words = BAD_SETTINGS[index]
    status, errors = found[index]
    assert isinstance(status, str)  # Python prints it and exits with 1
    assert status.startswith("error: "), status
    assert "\n" not in status
    assert "Traceback" not in errors
    for word in words:
        assert word in status
    written = {path.name for path in (folder / f"run{index}").glob("*")}
    assert written <= {".hydra", ".lock", "train.log"}

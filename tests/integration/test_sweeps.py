"""Each job of a sweep has its own settings, the same on all of its ranks."""

import csv
from pathlib import Path

import pytest
import yaml
from hydra import compose

from nvae_lightning.cli.config_root import CONFIG_ROOT

from .conftest import Run

SPY = '''
"""Write the learning rate of each rank of each job."""
from pathlib import Path
from lightning.pytorch import Callback

class Spy(Callback):
    def on_train_start(self, trainer, pl_module):
        rate = trainer.optimizers[0].param_groups[0]["initial_lr"]
        run = Path(trainer.default_root_dir)
        line = f"{trainer.global_rank} {rate!r} {run}\\n"
        with (Path(__file__).parent / f"{run.name}.{trainer.global_rank}.txt").open("a") as file:
            file.write(line)
'''
QUICK = (
    "logger=csv", "trainer.max_steps=1", "trainer.log_every_n_steps=1", "hydra.sweep.dir=sweep",
    "model.hierarchy.max_groups_per_scale=1", "dataset.batch_size=8", "num_importance_samples=1",
    "trainer.limit_test_batches=1", "trainer.limit_train_batches=1",
    "trainer.limit_val_batches=1", "trainer.check_val_every_n_epoch=1", "~callbacks.pictures",
    "~callbacks.kl_per_group",
)  # fmt: skip


def _seen(folder: Path, *, num_jobs: int, num_ranks: int) -> list[float]:
    """Learning rate of each job, which all its ranks must share, as they share a folder."""
    assert sorted(p.name for p in (folder / "sweep").iterdir() if p.is_dir()) == [
        str(job) for job in range(num_jobs)
    ]
    assert len(list(folder.glob("*.*.txt"))) == num_jobs * num_ranks
    rates = []
    for job in range(num_jobs):
        run = folder / "sweep" / str(job)
        found = set()
        for rank in range(num_ranks):
            (line,) = (folder / f"{job}.{rank}.txt").read_text().splitlines()
            number, rate, place = line.split(maxsplit=2)
            assert int(number) == rank
            assert Path(place) == run
            found.add(float(rate))
        assert len(found) == 1
        rates += found
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["optimizer"]["lr"] == rates[-1]
        assert (run / "metrics.csv").is_file()
        assert (run / "checkpoints" / "last.ckpt").is_file()
    return rates


@pytest.fixture
def sweep(run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a sweep whose jobs record their learning rates."""
    (tmp_path / "sweep_spy.py").write_text(SPY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda *overrides: run_train(
        "-m", *QUICK, "+callbacks.spy._target_=sweep_spy.Spy", *overrides
    )


@pytest.mark.slow
def test_an_optuna_sweep_draws_once_for_both_ranks_and_minimises_validation(
    sweep: Run, tmp_path: Path
) -> None:
    result = sweep(
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1",
        "optimizer.lr=interval(0.001,0.01)", "trainer=cpu", "trainer.devices=2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rates = _seen(tmp_path, num_jobs=4, num_ranks=2)
    assert len(set(rates)) == 4
    assert all(0.001 <= rate <= 0.01 for rate in rates)
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_params"]["optimizer.lr"] in rates
    bpds = []
    for job in range(4):
        with (tmp_path / "sweep" / str(job) / "metrics.csv").open() as file:
            bpds += [float(row["val/bpd"]) for row in csv.DictReader(file) if row["val/bpd"]]
    assert len(bpds) == 4
    assert best["best_value"] == pytest.approx(min(bpds))


@pytest.mark.slow
def test_both_ranks_of_a_grid_job_have_the_same_settings(sweep: Run, tmp_path: Path) -> None:
    result = sweep("optimizer.lr=0.002,0.003", "trainer=cpu", "trainer.devices=2")
    assert result.returncode == 0, result.stderr
    assert _seen(tmp_path, num_jobs=2, num_ranks=2) == [0.002, 0.003]


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side(sweep: Run, tmp_path: Path) -> None:
    result = sweep("optimizer.lr=0.002,0.003", "trainer=cpu", "launcher=joblib")
    assert result.returncode == 0, result.stderr
    assert _seen(tmp_path, num_jobs=2, num_ranks=1) == [0.002, 0.003]


@pytest.mark.slow
def test_a_failing_job_is_named_and_the_others_continue(sweep: Run, tmp_path: Path) -> None:
    result = sweep("num_importance_samples=0,1,-1", "trainer=cpu")
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    message = "error: module: num_importance_samples must be an integer of at least 1, got"
    assert [line.partition(" (given")[0] for line in lines] == [
        f"job 0: {message} 0",
        f"job 2: {message} -1",
    ]
    assert "Traceback" not in result.stderr
    assert (tmp_path / "sweep" / "1" / "checkpoints" / "last.ckpt").is_file()


LAUNCHERS = {
    "joblib": "JoblibLauncher",
    "submitit_local": "LocalLauncher",
    "submitit_slurm": "SlurmLauncher",
}


@pytest.mark.usefixtures("compose_config")
@pytest.mark.parametrize(
    "name", [path.stem for path in (CONFIG_ROOT / "conf" / "launcher").glob("*.yaml")]
)
def test_every_launcher_composes(name: str) -> None:
    config = compose("train", [f"launcher={name}"], return_hydra_config=True)
    assert config.hydra.launcher._target_.endswith(LAUNCHERS[name])
    assert "launcher" not in config

"""The wheel contains the configs and works from another folder."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_installed_wheel_trains_an_experiment_and_samples_from_its_own_weights(
    tmp_path: Path,
) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    assert not list(site.rglob("results")) + list(site.rglob("*.ipynb"))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    commands = {
        "train": (
            "experiment=table4", "dataset=mnist_5k", "model=tiny", "trainer=cpu", "logger=csv",
            "hydra.mode=RUN", "hydra.run.dir=run", "trainer.max_steps=2",
        ),
        "sample": (
            "ckpt_path=mnist", "temperature=0.7", "recalibration.num_passes=2", "num_samples=4",
            "hydra.run.dir=run",
        ),
    }  # fmt: skip
    for name, overrides in commands.items():
        code = (
            "import nvae_lightning, runpy; print(nvae_lightning.__file__);"
            f"runpy.run_module('nvae_lightning.{name}', run_name='__main__')"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, *overrides],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert str(site) in result.stdout.splitlines()[0]
    assert (folder / "run" / "metrics.csv").is_file()
    assert (folder / "run" / "prior.png").is_file()

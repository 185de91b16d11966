"""The wheel contains the configs and works from another folder."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_an_installed_wheel_trains_an_experiment(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    assert not list(site.rglob("results"))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    command = [
        sys.executable, "-c",
        "import nvae_lightning, runpy; print(nvae_lightning.__file__);"
        "runpy.run_module('nvae_lightning.train', run_name='__main__')",
    ]  # fmt: skip
    overrides = [
        "experiment=table4", "dataset=mnist_5k", "model=tiny", "trainer=cpu", "logger=csv",
        "hydra.mode=RUN", "hydra.run.dir=run", "trainer.max_steps=2",
    ]  # fmt: skip
    result = subprocess.run(
        [*command, *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stdout.splitlines()[0]
    assert (folder / "run" / "metrics.csv").is_file()

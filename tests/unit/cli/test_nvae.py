"""``nvae`` lists the commands and runs the requested one."""

import subprocess
import sys

import pytest

from nvae_lightning.cli import nvae


def test_commands_are_listed_without_importing_torch() -> None:
    code = """
import sys
from nvae_lightning.cli.nvae import main
main()
assert "torch" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "  train      Train" in result.stdout
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert listed == set(nvae.list_commands())
    assert {"train", "evaluate", "sample", "score", "benchmark", "prepare"} <= listed


def test_the_nearest_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nvae", "trian", "model=tiny"])
    with pytest.raises(SystemExit, match=r"unknown command 'trian'; did you mean train\?"):
        nvae.main()


def test_a_command_runs_as_the_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    called = {}
    monkeypatch.setattr(sys, "argv", ["nvae", "train", "model=tiny"])
    monkeypatch.setattr("runpy.run_module", lambda name, **how: called.update(how, name=name))
    nvae.main()
    assert called == {"name": "nvae_lightning.train", "run_name": "__main__", "alter_sys": True}
    assert sys.argv == ["nvae", "model=tiny"]


def test_a_config_is_printed_without_importing_lightning() -> None:
    code = """
import sys
from nvae_lightning.cli.nvae import main
sys.argv = ["nvae", "train", "--cfg", "job", "trainer=cpu", "model=tiny"]
main()
assert "lightning" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "max_steps: " in result.stdout

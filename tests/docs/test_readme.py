"""What the README tells people to do works."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

DRIVER = """
import contextlib, io, json, sys
from nvae_lightning.cli import run
from nvae_lightning.train import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["train", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(main)
    print(len(printed.getvalue().splitlines()))
"""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_training_commands_compose(tmp_path: Path) -> None:
    commands = [
        shlex.split(line)[3:]
        for block in _blocks("bash")
        for line in block.splitlines()
        if line.startswith("python -m nvae_lightning.train")
    ]
    assert len(commands) >= 8
    printing = [
        [argument for argument in command if argument not in ("-m", "--cfg", "job")]
        for command in commands
    ]
    # Of a sweep's list of values the first stands for all.
    printing = [[re.sub(r"=(\w+),.*", r"=\1", a) for a in command] for command in printing]
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([[*c, "--cfg", "job"] for c in printing])],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert all(int(lines) > 100 for lines in result.stdout.split())
    assert len(result.stdout.split()) == len(commands)


def test_the_python_example_runs() -> None:
    (example,) = _blocks("python")
    names: dict[str, Tensor] = {}
    exec(example, names)
    assert names["nats"].shape == (4,)
    assert names["nats"].isfinite().all()
    for images in ("images", "mixed"):
        assert names[images].shape == (4, 3, 32, 32)


def test_no_figure_is_left_to_fill_in() -> None:
    assert not re.findall(r"\b(?:TODO|TBD|XXX|[A-Z]{7,})\b", README)


def test_named_files_and_targets_exist() -> None:
    for path in re.findall(r"\]\((experiments/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets

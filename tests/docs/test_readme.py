"""What the README tells people to do works."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm_python import run_python

from nvae_lightning.model import NVAE, Image

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

DRIVER = """
import contextlib, importlib, io, json, sys
from nvae_lightning.cli.command import run
for command, *arguments in json.loads(sys.argv[1]):
    sys.argv = [command, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(importlib.import_module(f"nvae_lightning.{command}").main)
    print(len(printed.getvalue().splitlines()))
"""

COMMAND = re.compile(r"^.*?-m nvae_lightning\.(\w+) (.*)$")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_commands_compose(tmp_path: Path) -> None:
    found = [COMMAND.match(f"{line} ") for block in _blocks("bash") for line in block.splitlines()]
    commands = [[match[1], *shlex.split(match[2])] for match in found if match]
    assert {command for command, *_ in commands} == {
        "benchmark", "convert", "dashboard", "evaluate", "prepare", "preview", "report", "sample",
        "score", "train",
    }  # fmt: skip
    assert len(commands) >= 19
    # Of a sweep's list of values, or of its distributions, one value stands for all.
    values = [(r"=(\w+|\[\d+\]),.*", r"=\1"), (r"=interval\((.*),.*\)", r"=\1")]
    printing = []
    for command in commands:
        for pattern, value in values:
            command = [re.sub(pattern, value, argument) for argument in command]
        printing.append([a for a in command if a not in ("-m", "--cfg", "job")])
    lines = json.dumps([[*command, "--cfg", "job"] for command in printing])
    result = run_python("-c", DRIVER, lines, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(int(lines) >= 3 for lines in result.stdout.split())
    assert len(result.stdout.split()) == len(commands)


def test_the_python_examples_run(
    build_nvae: Callable[..., NVAE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_nvae(Image(channels=1, size=28, bits=1, padding=2)).save_pretrained(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    using, building = _blocks("python")
    names: dict[str, Any] = {}
    exec(using, names)
    assert names["nats"].shape == (4,)
    assert names["nats"].isfinite().all()
    for images in ("images", "mixed"):
        assert names[images].shape == (4, 1, 28, 28)
    exec(building, names)
    assert len(names["inference"].latents) == 6
    assert names["inference"].likelihood.mean.shape == (4, 3, 32, 32)


def test_no_figure_is_left_to_fill_in() -> None:
    assert "@@" not in README
    assert not re.findall(r"\b(?:TODO|TBD|XXX|(?!SIGTERM)[A-Z]{7,})\b", README)


def test_named_files_and_targets_exist() -> None:
    for path in re.findall(r"\]\((experiments/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets

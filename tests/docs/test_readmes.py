"""Commands and examples in the READMEs work, and the files that they name exist."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from warm_python import run_python

import nvae_lightning

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(nvae_lightning.__file__).parent
FOLDERS = ("conf", "experiments", "src", "tests")
READMES = [
    ROOT / "README.md",
    *sorted(
        p
        for name in ("conf", "experiments", "src", "tests")
        for p in (ROOT / name).rglob("README.md")
    ),
]
README = READMES[0].read_text(encoding="utf-8")
COMMANDS = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}

DRIVER = """
import contextlib, importlib, io, json, sys
from nvae_lightning.cli.command import run
for command, *arguments in json.loads(sys.argv[1]):
    sys.argv = [command, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(importlib.import_module(f"nvae_lightning.{command}").main)
    print(len(printed.getvalue().splitlines()))
"""

DROPPED = ("-m", "--cfg", "job")
COMMAND = re.compile(r"^.*?(?:-m nvae_lightning\.|\bnvae )(\w+) (.*)$")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_commands_compose(tmp_path: Path) -> None:
    lines = [
        line
        for path in READMES
        for block in _blocks(path.read_text(encoding="utf-8"), "bash")
        for line in block.splitlines()
    ]
    found = [COMMAND.match(f"{line} ") for line in lines]
    commands = {(match[1], *shlex.split(match[2])) for match in found if match}
    assert {command for command, *_ in commands} == COMMANDS
    # One value stands for a sweep's list of values.
    printing = [
        [
            re.sub(r"=(\w+|\[\d+\]),.*", r"=\1", a)
            for a in command
            if a not in ("-m", "--cfg", "job")
        ]
        for command in sorted(commands)
    ]
    arguments = json.dumps([[*command, "--cfg", "job"] for command in printing])
    result = run_python("-c", DRIVER, arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [int(lines) >= 3 for lines in result.stdout.split()] == [True] * len(printing)


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    using, training = _blocks(README, "python")
    names: dict[str, Any] = {}
    exec(using, names)
    assert names["nats"].shape == (4,)
    assert names["nats"].isfinite().all()
    assert names["images"].shape == names["mixed"].shape == (4, 1, 28, 28)
    assert (tmp_path / "folder" / "config.json").is_file()
    exec(training, names)
    assert names["module"].model.architecture == names["model"].architecture


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_linked_files_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_no_placeholder_is_left() -> None:
    for path in READMES:
        found = re.findall(r"@@|\b(?:TODO|TBD|XXX)\b", path.read_text(encoding="utf-8"))
        assert not found, path


def test_named_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= targets


def test_readme_has_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= 200


def test_where_things_are_matches_the_tree() -> None:
    section = README.partition("\n## Where things are\n")[2].partition("\n## ")[0]
    lines = section.strip().splitlines()
    assert len(lines) <= 25
    places = {p for line in lines[2:] for p in re.findall(r"`([\w/.*]+)`", line.split("|")[1])}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {Path(place).name for place in places} == rooms | {
        "*.py",
        "weights",
        "conf",
        "experiments",
        "tests",
    }
    commands = next(line for line in lines if "*.py" in line)
    assert set(re.findall(r"`(\w+)`", commands)) == COMMANDS

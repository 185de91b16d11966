"""Signals end a command at any time with one line and the status 128 + signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
COMMAND = """
import os, signal, sys, time
from nvae_lightning.utilities.signals import if_ended, leave, raised, tell, take_over, Interrupted
def send(name):
    os.kill(os.getpid(), getattr(signal, name))
def command():
{body}
take_over()
{before}
try:
    with raised():
        command()
except Interrupted as error:
    tell(error.signum)
    sys.exit(128 + error.signum)
"""


def run(body: str, before: str = "", **environment: str) -> tuple[int, str]:
    code = COMMAND.format(body=textwrap.indent(body, "    "), before=before)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_names_the_missing_result_and_sets_the_exit_status(name: str) -> None:
    status, text = run(f"if_ended('no result; again')\nsend({name!r})\nprint('result')")
    assert text == f"ended by {name}: no result; again\n"
    assert status == 128 + getattr(signal, name)


def test_a_signal_before_the_command_ends_it_immediately() -> None:
    status, text = run("print('result')", before="send('SIGINT')")
    assert text == "ended by SIGINT: nothing was finished; give the same command again\n"
    assert status == 130


@pytest.mark.parametrize("caught", ["Exception", "KeyboardInterrupt"])
def test_a_library_cannot_swallow_the_signal(caught: str) -> None:
    status, text = run(f"try:\n  send('SIGINT')\nexcept {caught}:\n  print('swallowed')")
    assert (status, text.count("\n")) == (130, 1)


def test_a_second_ctrl_c_ends_a_hanging_command_with_the_same_line() -> None:
    body = (
        "try:\n  send('SIGINT')\nfinally:\n  send('SIGTERM')\n  send('SIGINT')\n  time.sleep(50)"
    )
    status, text = run(body)
    assert (status, text.count("\n"), text.startswith("ended by SIGINT")) == (130, 1, True)


def test_only_the_first_rank_prints() -> None:
    assert run("send('SIGTERM')", LOCAL_RANK="1") == (143, "")


def test_a_forked_worker_ends_silently() -> None:
    body = "if not (pid := os.fork()):\n  send('SIGINT')\n  print('worker')\nprint(os.wait()[1])"
    assert run(body) == (0, f"{int(signal.SIGINT)}\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sample", "prepare", "report"])
def test_a_signal_during_imports_gives_one_line(command: str) -> None:
    for name in ("SIGINT", "SIGTERM"):
        code = [sys.executable, "-X", "importtime", "-m", f"nvae_lightning.{command}"]
        process = subprocess.Popen(code, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if "torch" in line:
                process.send_signal(getattr(signal, name))
                break
        _, text = process.communicate(timeout=60)
        said = [line for line in text.splitlines() if not line.startswith("import time:")]
        assert process.returncode == 128 + getattr(signal, name), json.dumps(said)
        assert len(said) == 1
        assert said[0].startswith(f"ended by {name}: ")

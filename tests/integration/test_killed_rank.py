"""If one of two ranks of the training command dies or stops, the other one ends."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

PR_SET_CHILD_SUBREAPER = 36


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def other_ranks(group: int) -> list[int]:
    """Processes that Lightning has started in a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group and int(folder.name) != group:
                environment = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
                if b"LOCAL_RANK=1" in environment and b"nvae_lightning" in command:
                    found.append(int(folder.name))
        except (OSError, ProcessLookupError):
            continue
    return found


@pytest.fixture
def _adopt_orphans() -> Iterator[None]:
    # Orphans become children of this process, so that it can read their exit status.
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextmanager
def two_ranks(folder: Path, *overrides: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """Train on two ranks until the first checkpoint; yield rank 0 and the process id of rank 1."""
    log = folder / "log"
    with log.open("w") as output:
        first = subprocess.Popen(
            [
                sys.executable, "-m", "nvae_lightning.train", "trainer=cpu", "trainer.devices=2",
                "logger=csv", "dataset.batch_size=8", "hydra.run.dir=run",
                "trainer.limit_test_batches=1", "callbacks.checkpoint.every_n_train_steps=2",
                *overrides,
            ],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output,
            stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
        wait_for(lambda: checkpoint.exists() or first.poll() is not None, 120, "the first steps")
        assert first.poll() is None, log.read_text()
        (second,) = other_ranks(first.pid)
        yield first, second
        wait_for(lambda: not other_ranks(first.pid), 60, "the remaining processes")
    finally:
        try:
            os.killpg(first.pid, signal.SIGKILL)
        except ProcessLookupError:
            print("all have ended")
        first.wait()
    print(log.read_text()[-2000:])


def wait_for_orphan(pid: int) -> int:
    """Wait for a process whose parent has ended, and return its exit status."""
    status: list[int] = []

    def ended() -> bool:
        found, code = os.waitpid(pid, os.WNOHANG)
        status.extend([os.waitstatus_to_exitcode(code)] if found else [])
        return bool(found)

    wait_for(ended, 60, "rank 1")
    return status[0]


@pytest.mark.usefixtures("_adopt_orphans")
@pytest.mark.parametrize("killed", ["rank 0", "rank 1"])
def test_the_other_rank_ends_within_a_minute(tmp_path: Path, killed: str) -> None:
    with two_ranks(tmp_path) as (first, second):
        if killed == "rank 0":
            first.kill()
            first.wait()
            assert wait_for_orphan(second) != 0
        else:
            os.kill(second, signal.SIGKILL)
            wait_for(lambda: first.poll() is not None, 60, "rank 0")
            assert first.returncode != 0


@pytest.mark.usefixtures("_adopt_orphans")
@pytest.mark.parametrize("stopped", ["rank 0", "rank 1"])
def test_a_stopped_rank_is_named(tmp_path: Path, stopped: str) -> None:
    with two_ranks(tmp_path, "trainer.timeout_minutes=0.1") as (first, second):
        os.kill(first.pid if stopped == "rank 0" else second, signal.SIGSTOP)
        wait_for(lambda: first.poll() is not None, 60, "the end")
        if stopped == "rank 0":  # rank 1 has killed it
            assert first.returncode == -signal.SIGKILL
            assert wait_for_orphan(second) == 1
        else:
            assert first.returncode == 1
    lines = (tmp_path / "log").read_text().rpartition("error: ")
    assert lines[2].count("\n") == 1
    assert lines[2].startswith(
        f"{stopped} has not answered for 0.1 minutes (trainer.timeout_minutes); steps after the "
        "last checkpoint are not saved; resume with ckpt_path=last hydra.run.dir="
    )
    assert "Traceback" not in lines[0]

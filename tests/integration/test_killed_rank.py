"""When one of two processes of the training command dies, the other does not wait for it."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

PR_SET_CHILD_SUBREAPER = 36


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def other_ranks(group: int) -> list[int]:
    """Processes of a process group that Lightning has started."""
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
    # A process whose parent has died becomes this one's child, whose exit status can be had.
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.usefixtures("_adopt_orphans")
@pytest.mark.parametrize("killed", ["rank 0", "rank 1"])
def test_the_other_rank_ends_within_a_minute(tmp_path: Path, killed: str) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        first = subprocess.Popen(
            [
                sys.executable, "-m", "nvae_lightning.train", "trainer=cpu", "trainer.devices=2",
                "logger=csv", "dataset.batch_size=8", "hydra.run.dir=run",
                "+trainer.limit_test_batches=1", "callbacks.checkpoint.every_n_train_steps=2",
            ],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output,
            stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
        wait_for(lambda: checkpoint.exists() or first.poll() is not None, 120, "the first steps")
        assert first.poll() is None, log.read_text()
        (second,) = other_ranks(first.pid)
        if killed == "rank 0":
            first.kill()
            first.wait()
            status: list[int] = []

            def ended() -> bool:
                pid, code = os.waitpid(second, os.WNOHANG)
                status.extend([os.waitstatus_to_exitcode(code)] if pid else [])
                return bool(pid)

            wait_for(ended, 60, "rank 1")
            assert status[0] != 0
        else:
            os.kill(second, signal.SIGKILL)
            wait_for(lambda: first.poll() is not None, 60, "rank 0")
            assert first.returncode != 0
        wait_for(lambda: not other_ranks(first.pid), 60, "processes that are left")
    finally:
        try:
            os.killpg(first.pid, signal.SIGKILL)
        except ProcessLookupError:
            print("all have ended")
        first.wait()
    print(log.read_text()[-2000:])

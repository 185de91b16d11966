"""Only one process at a time runs in a folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvae_lightning.cli import run_folder

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


@pytest.fixture(autouse=True)
def _released(monkeypatch: pytest.MonkeyPatch) -> object:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    yield
    run_folder.release()


def _other_process_may_hold(folder: Path) -> bool:
    """Try to lock the folder in a child, which holds none of this process's locks."""
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, str(folder / run_folder.LOCK)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(run_folder.fcntl is None, reason="requires fcntl")
def test_a_folder_is_held_until_it_is_released(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "run"
    run_folder.hold(folder)
    run_folder.hold(folder)  # by the same process
    assert not _other_process_may_hold(folder)
    run_folder.release()
    assert _other_process_may_hold(folder)


@pytest.mark.skipif(run_folder.fcntl is None, reason="requires fcntl")
def test_a_second_run_is_refused_and_told_the_folder(tmp_path: Path) -> None:
    assert run_folder.fcntl is not None
    with (tmp_path / run_folder.LOCK).open("w") as file:
        run_folder.fcntl.flock(file, run_folder.fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"another run is writing to '{tmp_path}'.*FOLDER"):
            run_folder.hold(tmp_path)
    run_folder.hold(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="requires fork")
def test_a_worker_that_outlives_its_parent_does_not_hold_the_folder(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys, time
from nvae_lightning.cli import run_folder
run_folder.hold(pathlib.Path(sys.argv[1]))
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(1)
    os.write(writing, b"0")
    time.sleep(20)
    os._exit(0)
os.read(reading, 1)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    run_folder.hold(tmp_path)


@pytest.mark.parametrize("name", RANKS)
def test_other_ranks_run_in_the_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    run_folder.hold(tmp_path)
    assert not (tmp_path / run_folder.LOCK).exists()
    monkeypatch.setenv(name, "0")
    assert run_folder.is_first_rank()


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.warns(UserWarning, match="cannot be locked"):
        run_folder.hold(tmp_path)

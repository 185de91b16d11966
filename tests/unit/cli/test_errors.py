"""System errors give one line, and no file is left half written."""

import errno
import logging.config
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException

from nvae_lightning.cli.errors import describe_system_error, one_line_errors
from nvae_lightning.cli.startup import begin_command
from nvae_lightning.utilities.files import whole_file, write_text


def _error(code: int, path: str | Path | None = None) -> OSError:
    return (
        OSError(code, os.strerror(code))
        if path is None
        else OSError(code, os.strerror(code), str(path))
    )


def _wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except OSError as cause:
            raise RuntimeError("unexpected pos 320 vs 214") from cause
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_a_system_error_is_one_line_with_path_reason_and_remedy(code: int) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors(), one_line_errors():
        raise _error(code, "/somewhere/file")
    line = str(ended.value)
    assert line.count("error: ") == 1
    assert "'/somewhere/file'" in line
    assert os.strerror(code) in line
    assert "; " in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        _wrapped(_error(errno.ENOSPC)),
        RuntimeError("PytorchStreamWriter failed: No space left on device"),
        _error(errno.ENOSPC),
        OSError(
            "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
            "last):\n  File x\nOSError: [Errno 28] No space left on device"
        ),
    ],
    ids=["cause", "text", "no name", "worker"],
)
def test_a_full_disk_is_recognised_in_errors_of_libraries(error: Exception) -> None:
    described = describe_system_error(error)
    assert described is not None
    assert "No space left on device" in described
    assert "\n" not in described


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), AssertionError("two sizes"), KeyError("x")]
)
def test_errors_of_the_program_keep_their_traceback(error: Exception) -> None:
    assert describe_system_error(error) is None
    with pytest.raises(type(error)), one_line_errors():
        raise error


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("trainer.strategy: got ddp_fork", "error: trainer.strategy: got ddp_fork"),
        ("trainer: got nothing", "error: trainer: got nothing"),
        ("got ddp_fork", "error: trainer: got ddp_fork"),
    ],
)
def test_an_error_of_a_class_names_its_setting_once(message: str, line: str) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise InstantiationException("Error in call\nfull_key: trainer") from ValueError(message)
    assert str(ended.value) == line


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "missing" / "x.log")}
    with pytest.raises(SystemExit) as ended, one_line_errors():
        logging.config.dictConfig({"version": 1, "handlers": {"file": handler}})
    assert "x.log' (No such file or directory)" in str(ended.value)


def test_a_file_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "before")

    def fill_the_disk() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise _error(errno.ENOSPC)

    with pytest.raises(OSError, match=r"result\.json"):
        fill_the_disk()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from nvae_lightning.utilities.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text(Path(sys.argv[1]), 'x' * 9000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "result.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "File too large" in result.stderr
    assert "result.json" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_command_ignores_the_backend_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for arguments, original, backend in (
        (["script.py"], ["python", "script.py"], "module://matplotlib_inline.backend_inline"),
        (["-m"], ["python", "-m", "mine"], "module://matplotlib_inline.backend_inline"),
        (["-m"], ["python", "-m", "nvae_lightning.preview"], "agg"),
    ):
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(sys, "orig_argv", original)
        begin_command()
        assert os.environ["MPLBACKEND"] == backend

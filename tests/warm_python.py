"""Run Python programs in forks of one process that has already imported this package.

A command then costs its own work instead of ten seconds of imports. It has its own working
directory, environment, arguments, output and exit status, as if ``python ARGUMENT…`` had been run.
As a script, this file is that process.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


class Process:
    """A program that runs in a fork.

    Args:
        server: Process to fork.
        request: Arguments, working directory, environment and output files of the program.
    """

    def __init__(self, server: subprocess.Popen[str], request: Mapping[str, Any]) -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        self._replies = server.stdout
        self.pid = int(self._replies.readline())
        self.returncode: int | None = None

    def ends_within(self, seconds: float) -> bool:
        """Wait at most `seconds`; return whether the program has ended."""
        if self.returncode is None and select.select([self._replies], [], [], seconds)[0]:
            self.returncode = int(self._replies.readline())
        return self.returncode is not None

    def kill(self) -> None:
        """Kill the program and wait for its end."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            assert self.ends_within(60)


def start_python(
    *arguments: str, cwd: Path, stdout: Path, stderr: Path, env: Mapping[str, str] | None = None
) -> Process:
    """Start ``python ARGUMENT…``; only one program can run at a time.

    Args:
        arguments: ``-m MODULE``, ``-c CODE`` or a script, and its arguments.
        cwd: Working directory.
        stdout: File to write the output to.
        stderr: File to write errors to, possibly the same.
        env: Complete environment; None for the tests' environment with one thread.
    """
    environment = dict(_environment() if env is None else env)
    request = {"arguments": arguments, "cwd": str(cwd), "environment": environment}
    return Process(_server(), {**request, "files": [os.devnull, str(stdout), str(stderr)]})


def run_python(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENT…`` and return its exit status and output: see `start_python`."""
    if not hasattr(os, "fork"):
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=_environment() if env is None else env,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = start_python(*arguments, cwd=cwd, stdout=stdout, stderr=stderr, env=env)
        if not process.ends_within(timeout):
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout, stdout.read_text())
        assert process.returncode is not None
        return subprocess.CompletedProcess(
            arguments, process.returncode, stdout.read_text(), stderr.read_text()
        )


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@cache
def _server() -> subprocess.Popen[str]:
    # Unbuffered replies, which `select` must not miss.
    server = subprocess.Popen(
        [sys.executable, __file__], env={**_environment(), "MPLBACKEND": "agg"}, text=True,
        bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def _import_all() -> None:
    """Import the modules that commands import, including those imported when they run."""
    package = Path(importlib.import_module("nvae_lightning").__path__[0])
    names = sorted(path.stem for path in package.glob("[a-z]*.py"))
    late = ("matplotlib.pyplot", "mlxtend.data", "torch._inductor.compile_fx")
    for name in (*(f"nvae_lightning.{name}" for name in names), *late):
        importlib.import_module(name)


def _serve() -> dict[str, Any] | None:
    """Fork for each request, and return it in the fork."""
    gc.collect()
    gc.freeze()  # so that garbage collection in a fork does not copy memory
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def _become(request: dict[str, Any]) -> None:
    """Run the program of a request in this process."""
    for finalizer in list(weakref.finalize._registry):  # pyright: ignore[reportAttributeAccessIssue]
        finalizer.detach()  # the server's, such as wandb's temporary folders
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, path in enumerate(request["files"]):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND if number else os.O_RDONLY
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    first, *others = request["arguments"]
    sys.orig_argv = [sys.executable, first, *others]
    extra = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [request["cwd"], *filter(None, extra)]
    sys.path.append(str(Path(__file__).parent))  # for test files, which import this one
    if first == "-c":
        code, *sys.argv[1:] = others
        sys.argv[0] = "-c"
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        module, *arguments = others
        sys.argv = ["-m", *arguments]
        importlib.import_module("nvae_lightning.cli.startup").begin_command()
        sys.modules.pop(module, None)  # runpy warns about modules that are already imported
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *others]
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _end(status: int) -> None:
    """Exit like the interpreter, but without deleting all modules, which takes seconds."""
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _main() -> None:
    _import_all()
    status = 0
    if request := _serve():
        try:
            _become(request)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
    _end(status)


if __name__ == "__main__":
    _main()

"""Two hosts with their own names, addresses and processes, on one cable, on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

NAMES = ("host-a", "host-b")
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # reserved for documentation

#: Name the host, let it know only the other one, and mount a folder read-only, if there is one.
SETUP = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
[ -z "$3" ] || { mount --bind "$3" "$3"; mount -o remount,bind,ro "$3"; }
shift 3
exec "$@"
"""


class Host(NamedTuple):
    """A network namespace; its processes also have their own mounts, host name and ids.

    Args:
        name: Name of the host.
        space: Name of the network namespace.
        settings: Folder of its `hosts` and `nsswitch.conf`.
    """

    name: str
    space: str
    settings: Path

    @contextmanager
    def started(
        self, *command: str, cwd: Path, env: Mapping[str, str], log: Path, read_only: str = ""
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a command; kill it and all its processes afterwards.

        Args:
            command: Program and arguments.
            cwd: Working directory.
            env: Environment.
            log: File of its output.
            read_only: Folder that the host may only read.
        """
        with log.open("a") as output:
            process = subprocess.Popen(
                [
                    "ip", "netns", "exec", self.space,
                    "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
                    "sh", "-c", SETUP, "sh", self.name, str(self.settings), read_only, *command,
                ],
                cwd=cwd, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def cut(self) -> None:
        """Take the link down."""
        _ip("-n", self.space, "link", "set", "eth0", "down")


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Create the hosts, and delete them afterwards.

    Args:
        folder: Folder of their settings.
    """
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("requires root on Linux and iproute2")
    lines = [f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (folder / "nsswitch.conf").write_text("hosts: files\n")  # without waiting for name servers
    spaces = [f"nvae-{os.getpid()}-{name}" for name in NAMES]
    with ExitStack() as stack:
        for space in spaces:
            try:
                _ip("netns", "add", space)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no permission for network namespaces: {error.stderr.strip()}")
            stack.callback(_ip, "netns", "delete", space)
        first, second = (("eth0", "netns", space) for space in spaces)
        _ip("link", "add", *first, "type", "veth", "peer", "name", *second)
        for space, address in zip(spaces, ADDRESSES, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
        a, b = (Host(*pair, folder) for pair in zip(NAMES, spaces, strict=True))
        yield a, b


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

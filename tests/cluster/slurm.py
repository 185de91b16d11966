"""A SLURM cluster of two nodes on this machine: https://slurm.schedmd.com/slurm.conf.html."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .training import environment, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "squeue")

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")  # before a job's final state

CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Commands of the running cluster.

    Args:
        folder: Folder of its configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Lightning would look up the name of the first node.
        self.environment = environment(
            SLURM_CONF=str(folder / "slurm.conf"), MASTER_ADDR="127.0.0.1"
        )

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 60) -> str:
        """Run a command and return its output.

        Raises:
            CalledProcessError: If it fails.
        """
        result = subprocess.run(
            command, cwd=cwd or self.folder, env=self.environment, text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if result.returncode != 0:
            print(result.stdout)
        result.check_returncode()
        return result.stdout

    def submit(self, *arguments: str, cwd: Path) -> str:
        """Submit a script and return the job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def state(self, job: str) -> dict[str, str]:
        """Return SLURM's description of a job, such as ``JobState`` and ``Restarts``."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for(self, job: str, state: str) -> None:
        """Wait until a job is in a state.

        Raises:
            AssertionError: If the job ends in another one, or takes too long.
        """

        def reached() -> bool:
            found = self.state(job)["JobState"]
            assert found == state or found in ACTIVE, f"job {job}: {found}, expected {state}"
            return found == state

        try:
            wait_for(reached, f"job {job} to be {state}")
        except AssertionError:
            print((self.folder / "slurmctld.log").read_text()[-3000:])
            raise

    def shorten(self, job: str) -> None:
        """Set the time limit of a running job to between one and two minutes from now."""
        hours, minutes, seconds = map(int, self.state(job)["RunTime"].split(":"))
        limit = (hours * 3600 + minutes * 60 + seconds) // 60 + 2
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def start_now(self, job: str) -> None:
        """Skip most of the two minutes that SLURM waits before it starts a requeued job again.

        A node refuses credentials from the second in which the job was requeued.
        """
        self.run("scontrol", "update", f"JobId={job}", "TimeLimit=60", "StartTime=now+3seconds")


def missing_requirement() -> str | None:
    """Return why there can be no cluster here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "requires root on Linux"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"requires {', '.join(missing)}: apt-get install slurm-wlm munge"
    return None


@contextmanager
def cluster() -> Iterator[Slurm]:
    """Start the daemons, and end them and all jobs afterwards."""
    # The path of a socket is limited to a hundred characters.
    with tempfile.TemporaryDirectory(prefix="slurm") as name, ExitStack() as daemons:
        folder = Path(name)
        for place in ("state", "spool-n1", "spool-n2"):
            (folder / place).mkdir()
        controller, first, second = _free_ports(3)
        config = CONFIG.format(
            host=socket.gethostname().partition(".")[0], folder=folder, controller=controller,
            first=first, second=second,
        )  # fmt: skip
        (folder / "slurm.conf").write_text(config)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        slurm = Slurm(folder)
        files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        munged = ("munged", "--force", "--foreground", f"--socket={folder}/munge.sock", *files)
        daemons.enter_context(_daemon(slurm, *munged))
        wait_for((folder / "munge.sock").exists, "munged", 30)
        daemons.enter_context(_daemon(slurm, "slurmctld", "-D"))
        for node in ("n1", "n2"):
            daemons.enter_context(_daemon(slurm, "slurmd", "-D", "-N", node))
        try:
            wait_for(lambda: _num_idle(slurm) == 2, "two idle nodes", 60)
        except AssertionError:
            print((folder / "daemons.log").read_text())
            raise
        try:
            yield slurm
        finally:
            slurm.run("scancel", "--me")
            wait_for(lambda: not slurm.run("squeue", "--noheader").strip(), "the jobs' end", 90)


@contextmanager
def _daemon(slurm: Slurm, *command: str) -> Iterator[None]:
    with (slurm.folder / "daemons.log").open("a") as output:
        process = subprocess.Popen(
            command, env=slurm.environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _num_idle(slurm: Slurm) -> int:
    try:
        return int(slurm.run("sinfo", "--noheader", "--format=%D", "--states=idle") or 0)
    except subprocess.CalledProcessError:
        return 0  # the controller has not started


def _free_ports(number: int) -> list[int]:
    with ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(number)]
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in opened]

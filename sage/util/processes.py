"""The ranks of a run, as processes of this machine: started together, signalled together, ended together.

torch's elastic launcher restarts ranks and meets other machines, and answers a signal with a traceback. This
one does neither. Each rank has a session of its own, so the terminal's Ctrl-C reaches only this process, and
whatever a rank started can be ended with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from sage.util import stopping
from sage.util.stopping import Arrivals

# Environment variables of the ranks, unless the user has set them.
ENVIRONMENT = {
    # Otherwise glibc returns freed activations to the kernel and fetches the pages again: 1/7 of a CPU step.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    # One heap, so that the backward pass, which has its own thread, reuses the pages of the forward pass.
    "MALLOC_ARENA_MAX": "1",
    # oneDNN keeps a kernel of 0.6 MB for every text length. 256 are more than one micro-batch uses.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    # Idle threads of OpenMP sleep after about 30 us instead of 1 ms. Beside other processes, spinning threads
    # hold the cores that the others wait for: sampling from a small model took 7 times the processor time.
    "GOMP_SPINCOUNT": "10000",
    # A rank imports nothing from the folder that it is started in, which may be a foreign one.
    "PYTHONSAFEPATH": "1",
}
POLL = 0.05  # seconds
# Seconds for the other ranks to end by themselves, once one of them ended well or was stopped by a signal.
GRACE = 30.0
GB = 1e9


def machine_memory() -> int:
    """Bytes of memory that this machine has, or its container if that has less."""
    found = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found.append(int(Path(file).read_text()))
    return min(found)


def free_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that are free here: of the machine, or of its container if that has less left.

    Pages of files that were read count as used in a container. Those that are idle are given back at need.
    """
    found = [psutil.virtual_memory().available, machine_memory()]
    for folder, limit, used, idle in (
        (cgroups, "memory.max", "memory.current", "inactive_file"),
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError, KeyError):
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            lines = (folder / "memory.stat").read_text().splitlines()
            stat = dict(line.split() for line in lines)
            found.append(max(most - taken + int(stat[idle]), 0))
    return min(found)


def rank_environment(world_size: int) -> dict[str, str]:
    """This process's environment, with what ranks need, and each rank's share of the cores."""
    environment = {**ENVIRONMENT, **os.environ}
    if world_size > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world_size, 1)))
    return environment


@dataclass
class Rank:
    number: int
    process: subprocess.Popen[bytes]
    peak_gb: float = 0.0

    def ended(self) -> bool:
        """Whether it has ended. If so, everything that it started and left behind is ended too."""
        process = self.process
        if process.returncode is None:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_gb = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GB
                self.kill()
        return process.returncode is not None

    def signal(self, signum: int) -> None:
        if not self.ended():
            os.kill(self.process.pid, signum)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def run_ranks(world_size: int, command: Sequence[str], environment: Mapping[str, str], go_on: str) -> int:
    """Run Python with `command` once per rank, and return the exit status of all of them together.

    That is 0 if all ended well, 128 + N if signal N came, or if signal N killed a rank, and else the status
    of the rank that failed first. When this function returns, no rank is left, and nothing that a rank
    started. If a signal or a killed rank leaves a run unfinished, `go_on` says how to continue it.
    """
    arrivals = Arrivals()
    with stopping.handled(lambda signum, _: arrivals.add(signum)):
        ranks: list[Rank] = []
        # No rank has the writing end, so all of them see it close when this process dies.
        reading, writing = os.pipe()
        store = None
        try:
            if world_size > 1:
                from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

                # The ranks meet here. A port that was only looked up could be taken before rank 0 listens.
                store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            with stopping.blocked():
                for number in range(world_size):
                    place = {
                        "RANK": number,
                        "LOCAL_RANK": number,
                        "WORLD_SIZE": world_size,
                        "LOCAL_WORLD_SIZE": world_size,
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": store.port if store else 0,
                        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is ours, not rank 0's
                        stopping.WATCH: reading,
                    }
                    process = subprocess.Popen(
                        [sys.executable, *command],
                        env={**environment, **{name: str(value) for name, value in place.items()}},
                        start_new_session=True,
                        pass_fds=(reading,),
                    )
                    ranks.append(Rank(number, process))
            return wait(ranks, arrivals, go_on)
        finally:
            for rank in ranks:
                if not rank.ended():
                    rank.kill()
                    rank.process.wait()
            os.close(reading)
            os.close(writing)


def wait(ranks: Sequence[Rank], arrivals: Arrivals, go_on: str) -> int:
    """Wait for the ranks, pass a signal on to them, and decide how the run ended. Some may still run."""
    passed_on, alone_since = False, None
    while not all([rank.ended() for rank in ranks]):
        if not arrivals.first and stopping.abandoned():
            arrivals.add(signal.SIGTERM)
        if arrivals.first and not passed_on:
            passed_on = True
            for rank in ranks:
                rank.signal(arrivals.first)
        if arrivals.again:
            stopping.tell(f"ended at once: {go_on}")
            return arrivals.status
        done = [rank.process.returncode for rank in ranks if rank.ended()]
        if failure := first_failure(ranks, arrivals):
            return explain(failure, len(ranks), go_on)
        # Rank 0 has the last word in every command. One that was stopped leaves nothing to wait for.
        if arrivals.status in done or ranks[0].process.returncode == 0:
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > GRACE:
                left = [str(rank.number) for rank in ranks if not rank.ended()]
                stopping.tell(f"rank {', '.join(left)} did not end with the others, and is ended now")
                break
        time.sleep(POLL)
    failure = first_failure(ranks, arrivals)
    return explain(failure, len(ranks), go_on) if failure else arrivals.status


def first_failure(ranks: Sequence[Rank], arrivals: Arrivals) -> Rank | None:
    """A rank that failed, and was not just stopped by the signal. Ranks that lost it fail seconds later."""
    fine = (None, 0, arrivals.status)
    failed = [rank for rank in ranks if rank.process.returncode not in fine]
    return min(failed, key=lambda rank: rank.process.returncode, default=None)


def explain(rank: Rank, world_size: int, go_on: str) -> int:
    """The exit status of a rank that failed. It has said why itself, unless a signal killed it."""
    status = rank.process.returncode
    if status > 0:
        return status
    total = machine_memory() / GB
    peak = f"peak {rank.peak_gb:.1f} of {total:.1f} GB"
    cause = f" ({peak})"
    if -status == signal.SIGKILL and world_size * rank.peak_gb > total / 2:
        cause = f": probably out of memory ({peak}); lower micro_batch_tokens, or generation.batch_size"
    if -status == signal.SIGPROF:  # see sage.util.limits
        cause = ": the model's chat template computes without end; choose another with data.chat_template"
    stopping.tell(f"error: rank {rank.number} was killed by signal {-status}{cause}; then {go_on}")
    return 128 - status

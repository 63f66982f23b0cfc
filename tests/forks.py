"""Processes forked from one that has imported torch, because the import takes most of the time of a tiny run.

A fork has the locks of its parent's threads without the threads, so it may wait for one for ever. Whoever
forks here must have no threads of its own that hold locks; torture.py, which forks most, has none at all.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import TypeVar
from unittest import mock

from sage import cli, worker
from sage.util import processes, ranks, stopping

T = TypeVar("T")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_SILENT": "true"}
ENVIRONMENT["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # or a fork may hang in Arrow's allocator


@cache
def server() -> forkserver.ForkServer:
    """Starts processes as forks of one that has imported all that runs need, and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imported"])
    with mock.patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": os.path.dirname(__file__)}, clear=True):
        forkserver.ensure_running()
    return context


def on_ranks(world_size: int, job: Callable[..., T], *arguments: object, seconds: float = 600.0) -> list[T]:
    """What `job` returns on each rank of a new process group, which `job` joins itself."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    # The ranks meet here. A port that was only looked up could be taken before rank 0 listens.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(world_size)]
        started = [
            server().Process(
                target=be_rank, args=(file, {**place, "RANK": rank, "LOCAL_RANK": rank}, job, arguments)
            )
            for rank, file in enumerate(files)
        ]
        for process in started:
            process.start()
        left = {process.sentinel: process for process in started}
        deadline = time.monotonic() + seconds
        try:
            while left and (ended := connection.wait(left, deadline - time.monotonic())):
                for sentinel in ended:
                    process = left.pop(sentinel)
                    process.join()
                    if process.exitcode != 0:  # the others may have something to say, or wait for it
                        deadline = min(deadline, time.monotonic() + 10.0)
        finally:
            for process in left.values():
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, signal.SIGABRT)  # it says where it hangs
                process.join(10.0)
                process.kill()
                process.join()
        statuses = [process.exitcode for process in started]
        said = "".join(file.with_suffix(".txt").read_text() for file in files)
        assert not any(statuses), f"{statuses}\n{said[-4000:]}"
        return [pickle.loads(file.read_bytes()) for file in files]


def be_rank(file: Path, place: dict[str, object], job: Callable[..., object], arguments: tuple) -> None:
    """Do a job as a rank. What it returns and says is in files."""
    gc.freeze()  # what the server imported never becomes garbage
    write_to(file.with_suffix(".txt"))
    faulthandler.enable()
    os.environ.update({name: str(value) for name, value in place.items()})
    file.write_bytes(pickle.dumps(job(*arguments)))
    ranks.leave()


class Started:
    """A job in a fork of the server, in a session and with an environment of its own."""

    def __init__(self, job: Callable[..., object], *arguments: object, env: Mapping[str, str] = ENVIRONMENT):
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name, "output")
        self.process = server().Process(target=be_started, args=(self.file, dict(env), job, arguments))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def end(self, seconds: float = 300.0) -> tuple[int, str]:
        """Its exit status, and what it has written to standard output and standard error."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it still runs"
        said = self.file.read_text()
        self.folder.cleanup()
        return self.process.exitcode, said


def be_started(
    file: Path, env: Mapping[str, str], job: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    os.setsid()
    gc.freeze()
    write_to(file)
    os.environ.clear()
    os.environ.update(env)
    for signum in stopping.SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    job(*arguments)


def command(*words: str, env: Mapping[str, str] = ENVIRONMENT, ranks: int = 2) -> Started:
    """A `sage` command line. Its ranks are forks, too: at most so many in all."""
    return Started(be_command, words, ranks, env=env)


class Forked:
    """A forked process that does `job` in a session of its own, and otherwise is as `Popen` would start it.

    SIGABRT makes it write its stack to standard error, and ends it.
    """

    returncode: int | None = None

    def __init__(
        self, job: Callable[[], object], env: Mapping[str, str] = os.environ, keep: Sequence[int] = ()
    ):
        threads = [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        assert len(threads) == 1, f"a fork might wait for what these hold: {threads}"
        reading, writing = os.pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(writing)
            os.read(reading, 1)  # it has its session now, and can be killed with all that it starts
            os.close(reading)
            return
        status: object = 1
        try:
            os.setsid()
            for signum in stopping.SIGNALS:  # no exception of a handler may lead back to the parent's code
                signal.signal(signum, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            environment = dict(env)  # it may be os.environ itself
            os.environ.clear()
            os.environ.update(environment)
            os.write(writing, b"!")
            for number in os.listdir("/proc/self/fd"):  # as `exec` would
                if int(number) > 2 and int(number) not in keep:
                    with suppress(OSError):
                        os.close(int(number))
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest's have just been closed
            faulthandler.enable()
            job()
            status = 0
        except SystemExit as e:
            status = e.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(status if isinstance(status, int) else 1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit status. After these seconds it must say where it hangs, and end."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGABRT)
                deadline += 10.0
            time.sleep(0.01)
        return status


class ForkedCommand(Forked):
    """A `sage` command line in a forked process that works in `place`. Its ranks are forked, too."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], place: Path, output: Path, ranks: int):
        super().__init__(partial(self.command, words, place, output, ranks), env)

    @staticmethod
    def command(words: Sequence[str], place: Path, output: Path, ranks: int) -> None:
        os.chdir(place)
        write_to(output)
        be_command(words, ranks)


def write_to(file: Path) -> None:
    """Standard output and standard error go to this file from here on."""
    output = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_WRONLY, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)


def be_worker(run_dir: Path) -> None:
    """Do what a rank of one does."""
    sys.argv = ["sage.worker", str(run_dir)]
    worker.main()


def be_command(words: Sequence[str], ranks: int) -> None:
    """Do what a `sage` command line does.

    Its ranks wait in forks made before it begins: it soon has threads, of the store that ranks meet at.
    """
    with stopping.blocked():
        waiting = [WaitingRank() for _ in range(ranks)]

    def start(command: list[str], env: Mapping[str, str], start_new_session: bool, pass_fds: Sequence[int]):
        assert start_new_session
        rank = waiting.pop(0)
        rank.begin(command, env, pass_fds)
        return rank

    processes.subprocess = type("Module", (), {"Popen": start})  # pyright: ignore
    sys.argv = ["sage", *words]
    cli.main()


class WaitingRank(Forked):
    """A forked process that becomes a rank once it gets a command line. It ends with its parent."""

    def __init__(self):
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(partial(self.serve, theirs), keep=[theirs.fileno()])
        theirs.close()

    def begin(self, command: list[str], env: Mapping[str, str], pass_fds: Sequence[int]) -> None:
        """Do what `sage.util.processes` starts with `Popen`."""
        with suppress(OSError):  # killed meanwhile
            socket.send_fds(self.ours, [json.dumps([command, dict(env)]).encode()], [*pass_fds])
        self.ours.close()

    @staticmethod
    def serve(channel: socket.socket) -> None:
        message, fds, _, _ = socket.recv_fds(channel, 1 << 20, 1)
        if not message:
            return
        command, environment = json.loads(message)
        module, *words = command[2:]  # after `python -m`
        assert module == "sage.worker"
        os.environ.clear()
        os.environ.update(environment, **{stopping.WATCH: str(fds[0])})
        sys.argv = [module, *words]
        worker.main()

"""Runs on several machines: two launchers here, each with a home and a cache of its own."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from conftest import REPO, make_pairs, write_jsonl
from forks import ENVIRONMENT, on_ranks
from many_runs import ERROR_FILE, column, execute, freeze
from many_runs import __file__ as many_runs

from sage import config, launch, worker
from sage.util import ranks
from sage.util.errors import UserError


def two_machines(homes: list[Path], port: int, *words: str | Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a script with torchrun on two machines, of one rank each."""
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint=127.0.0.1:{port}"),
    ]
    agents = [
        subprocess.Popen(
            [*launcher, *map(str, words)],
            env={**ENVIRONMENT, "HOME": str(home), "LOGLEVEL": "ERROR"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for home in homes
    ]
    done = []
    for agent in agents:
        out, err = agent.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(agent.args, agent.returncode, out, err))
    return done


@pytest.fixture
def homes(tmp_path) -> list[Path]:
    folders = [tmp_path / "home_a", tmp_path / "home_b"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.fixture
def port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.slow
def test_two_machines_with_caches_of_their_own_train_as_one_machine_does(
    tiny_model, pair_file, problem_file, homes, port, tmp_path
):
    """Cold caches, and a warm one on either machine. Ranks that decide by their own files wait for ever."""
    common = [
        *("model=hf", f"model.path={tiny_model}", "model.dtype=float32", "world_size=2", "steps=2"),
        *("batch_size=4", "data.max_length=256", "micro_batch_tokens=1024", "save_every=1"),
        *("scorer=sage", "curriculum=sage", f"data.eval_path={pair_file}"),
    ]
    here = [*common, f"data.path={pair_file}"]
    one = freeze(tmp_path / "one", *here, f"cache_dir={tmp_path / 'cache'}")
    execute(2, [one])

    def run(name: str, *overrides: str, command: str = "train") -> Path:
        return freeze(tmp_path / name, *overrides, command=command)

    runs = [run(name, *here, f'cache_dir="~/{name}"') for name in ("both_cold", "warm_cold", "cold_warm")]
    (homes[0] / "warm_cold").symlink_to(homes[0] / "both_cold")
    (homes[1] / "cold_warm").symlink_to(homes[1] / "both_cold")
    # Files that rank 0's machine alone has, and that are small enough to be sent.
    write_jsonl(homes[0] / "problems.jsonl", [json.loads(line) for line in problem_file.open()][:3])
    cache = 'cache_dir="~/both_cold"'
    answers = ['benchmark.gsm8k.path="~/problems.jsonl"', "sampling.max_new_tokens=4", cache]
    scores = run("scores", *here, cache, command="score-dataset")
    (homes[0] / "scores").symlink_to(scores)
    scored = run("scored", *here, "+benchmark=gsm8k", *answers, 'data.scores="~/scores"')
    accuracy = run("accuracy", *common[:4], "benchmark=gsm8k", *answers, command="eval")
    # Files that both machines have, but not the same ones.
    for home, pairs in zip(homes, (make_pairs(20), make_pairs(21)), strict=True):
        write_jsonl(home / "pairs.jsonl", pairs)
    other = run("other", *common, 'data.path="~/pairs.jsonl"', cache)
    (homes[0] / "mine.jsonl").symlink_to(pair_file)
    alone = run("alone", *common, 'data.path="~/mine.jsonl"', cache)

    for agent in two_machines(homes, port, many_runs, *runs, scores, scored, accuracy, other, alone):
        assert agent.returncode == 0, (agent.stdout + agent.stderr)[-4000:]
    for run_dir in runs:
        assert column(run_dir, "loss") == column(one, "loss"), run_dir.name
        assert column(run_dir, "grad_norm") == column(one, "grad_norm"), run_dir.name
    for home in homes:  # each machine has filled its own cache
        for name in ("both_cold", "warm_cold", "cold_warm"):
            assert list((home / name).glob("pairs-*.arrow")), (home, name)
            assert list((home / name / "reference").glob("*.safetensors")), (home, name)
    for run_dir in (*runs, scores, scored, accuracy):
        assert (run_dir / "summary.json").is_file(), run_dir.name
    assert len((accuracy / "gsm8k" / "generations.jsonl").read_text().splitlines()) == 3
    assert "the tokenised pairs of ~/pairs.jsonl are not the same" in (other / ERROR_FILE).read_text()
    assert "mine.jsonl" in (alone / ERROR_FILE).read_text()


def wait_and_lose(folder: Path) -> None:
    """What two ranks do, each the first of its machine. Rank 0 dies in the end."""
    import torch.distributed as dist

    from sage.model.engine import init_distributed

    os.environ["LOCAL_RANK"] = "0"
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=1)  # what torch waits, unless it is asked to
    init_distributed()
    me = ranks.rank()
    assert ranks.main_only(lambda: time.sleep(2) or "slow") == "slow"
    assert ranks.machine_first(lambda: time.sleep(2 * me) or me) == me
    ranks.barrier()

    def refuse(number: int) -> str:
        if me == number:
            raise UserError(f"rank {number} refuses")
        return "fine"

    for number in (0, 1):
        for way in (ranks.machine_first, lambda work: ranks.agreed(work, "the files")):
            with pytest.raises(UserError, match=f"rank {number} refuses"):
                way(partial(refuse, number))
    assert ranks.agreed(lambda: "same", "the files") == "same"
    with pytest.raises(UserError, match=r"\(rank 1\) as on"):
        ranks.agreed(lambda: me, "the files")
    (folder / f"agreed{me}").touch()
    if me == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        ranks.barrier()
    (folder / "lost").write_text(str(time.monotonic() - started))


@pytest.mark.slow
def test_a_rank_waits_for_work_but_not_for_a_dead_rank(tmp_path):
    """Both machines run `agreed` and `machine_first`, and one refusal ends the work of both."""
    with pytest.raises(AssertionError, match=r"^\[-9, "):
        on_ranks(2, wait_and_lose, tmp_path)
    assert (tmp_path / "agreed0").exists() and (tmp_path / "agreed1").exists()
    assert float((tmp_path / "lost").read_text()) < 10


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    """Ranks meet within a limit, although they then wait for each other much longer."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(ranks, "MEET", timedelta(seconds=1))
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    store.set("here/1", "")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"not all 3 ranks connected to .*\(missing: 2\)"):
        ranks.join("gloo")
    assert time.monotonic() - started < 30


def test_start_false_prints_commands_and_starts_nothing(train, tmp_path):
    status, out, err = train("start=false", "world_size=2")
    assert status == 0, err
    run_dir = tmp_path / "run"
    assert [path.name for path in run_dir.iterdir() if path.is_file()] == ["config.yaml"]
    frozen = config.load(run_dir)
    assert isinstance(frozen, config.RunConfig) and frozen.start and frozen.world_size == 2
    assert launch.start_lines(2, run_dir) in out
    assert launch.SLURM_PLACE in (REPO / "docs" / "clusters.md").read_text()


SRUN = """#!/bin/sh
# Two tasks on two machines, as Slurm starts them. Their process ids are in files.
while case $1 in --*) true;; *) false;; esac; do shift; done
export SLURM_LOCALID=0
HOME=$HOME_A SLURM_PROCID=0 "$@" & first=$!
HOME=$HOME_B SLURM_PROCID=1 "$@" & second=$!
echo $first > "$HOME_A/pid"; echo $second > "$HOME_B/pid"
wait $first; status=$?
wait $second; exit $status
"""
SCONTROL = """#!/bin/sh
case $1 in show) echo 127.0.0.1;; requeue) touch "$HOME_A/requeued";; esac
"""


@pytest.mark.slow
def test_the_script_for_slurm_ends_at_a_signal_and_goes_on_when_requeued(
    tiny_model, pair_file, homes, tmp_path
):
    """The documented script as it stands, but for its experiment, with stand-ins for Slurm's own programs."""
    page = (REPO / "docs" / "clusters.md").read_text()
    (script,) = re.findall(r"^#!/bin/bash$.*?(?=^```)", page, re.M | re.S)
    overrides = [
        *("model=hf", f"model.path={tiny_model}", "model.dtype=float32", f"data.path={pair_file}"),
        *("steps=80", "batch_size=4", "data.max_length=256", "micro_batch_tokens=1024", "+baseline=dpo"),
        """'cache_dir="~/cache"'""",
    ]
    assert "+experiment=gsm8k data.path=FILE" in script
    file = tmp_path / "train.sbatch"
    file.write_text(script.replace("+experiment=gsm8k data.path=FILE", " ".join(overrides)))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME_A": str(homes[0]),
        "HOME_B": str(homes[1]),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    run_dir, requeued = tmp_path / "runs" / "7", homes[0] / "requeued"

    def submit() -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(file)],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    job = submit()
    log = run_dir / "metrics.jsonl"
    while job.poll() is None and not (log.exists() and '"grad_norm"' in log.read_text()):  # a step is done
        time.sleep(0.05)
    for home in homes:
        os.kill(int((home / "pid").read_text()), signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 138 and requeued.exists(), out
    assert "SIGUSR1 ended the run after its step" in out and "Traceback" not in out
    requeued.unlink()

    job = submit()
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and not requeued.exists(), out
    assert "resumed from" in out
    assert column(run_dir, "step") == list(range(1, 81)) and (run_dir / "summary.json").is_file()
    job = submit()  # a finished job that is submitted again does nothing
    assert job.communicate(timeout=60)[0] == "" and job.returncode == 0


def test_another_number_of_ranks_than_the_config_has_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"is a run of world_size=2, and .*world_size=4 start=false"):
        worker.check_world(tmp_path, 2)


def test_start_lines_share_the_ranks_among_machines(tmp_path):
    folder = tmp_path / "a folder"
    lines = launch.start_lines(6, folder).splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  ")]
    assert all(words[-1] == str(folder) for words in commands)
    assert [words[0] for words in commands] == ["sage", *2 * ["torchrun", "srun", "deepspeed"]]
    assert "--nproc-per-node=6" in commands[1] and {"--nnodes=2", "--nproc-per-node=3"} <= {*commands[4]}
    assert {"--num_nodes=2", "--num_gpus=3"} <= {*commands[6]}
    assert "--nproc-per-node=1" in launch.start_lines(1, folder) and "machines;" not in launch.start_lines(
        1, folder
    )


def test_start_false_needs_finished_pairs(sage, tiny_model, problem_file, tmp_path):
    status, _, err = sage(
        *("train", "model=hf", f"model.path={tiny_model}", "data=gsm8k", "start=false", "steps=1"),
        *(f"data.problems.path={problem_file}", f"hydra.run.dir={tmp_path / 'run'}"),
    )
    assert status == 2 and "start=false needs finished pairs" in err

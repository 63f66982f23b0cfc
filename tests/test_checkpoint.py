"""Interrupted and resumed equals uninterrupted, bit for bit; what cannot be resumed exactly is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import make_pairs, write_jsonl
from filelock import FileLock
from forks import ENVIRONMENT, command
from many_runs import (
    ERROR_FILE,
    column,
    execute,
    freeze,
    interrupted,
    largest_difference,
    metrics,
    weights,
)

from sage.training.setup import restore
from sage.util.checksums import CHECKSUMS_FILE, seal

pytestmark = pytest.mark.slow
VARIANTS = {
    "zero0": ["engine=zero0"],
    "zero1": ["engine=zero1"],
    "zero2": ["engine=zero2"],
    "zero3": ["engine=zero3"],
    "bf16_0": ["engine=zero0", "model.dtype=bfloat16"],
    "bf16_2": ["engine=zero2", "model.dtype=bfloat16"],
    "bf16_3": ["engine=zero3", "model.dtype=bfloat16"],
    "lora0": ["engine=zero0", "+model/lora=default", "model.lora.dropout=0.1"],
    "lora3": ["engine=zero3", "+model/lora=default"],
    "offload2": ["engine=zero2_offload", "optimizer.implementation=torch"],
}
TWO = ("zero0", "zero2", "zero3")


@pytest.fixture(scope="session")
def common(tiny_model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return [
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={write_jsonl(folder / 'pairs.jsonl', make_pairs(20))}",
        "data.max_length=130",
        "micro_batch_tokens=260",
        "steps=8",
        "batch_size=6",
        "optimizer.lr=1e-3",
        "save_every=4",
        f"cache_dir={folder / 'cache'}",
        "model.dtype=float32",
        "+baseline=dpo",
    ]


def both(world_size: int, names: list[str], common: list[str], root: Path) -> Path:
    """root/whole/NAME runs 8 steps at once. root/resumed/NAME is killed after step 4 and resumed."""
    wholes = [freeze(root / "whole" / n, *common, f"world_size={world_size}", *VARIANTS[n]) for n in names]
    execute(world_size, wholes)
    halves = [interrupted(root / "whole" / n, 4, root / "resumed" / n) for n in names]
    for half in halves:  # a kill in the middle of writing leaves these
        torn = half / "checkpoints" / ".step_8.tmp"
        shutil.copytree(half / "checkpoints" / "step_4", torn)
        (torn / "train_state.pt").write_bytes(b"half")
    execute(world_size, halves)
    assert not list(root.rglob(ERROR_FILE))
    return root


@pytest.fixture(scope="session")
def one(common, tmp_path_factory) -> Path:
    return both(1, list(VARIANTS), common, tmp_path_factory.mktemp("resume1"))


@pytest.fixture(scope="session")
def two(common, tmp_path_factory) -> Path:
    return both(2, list(TWO), common, tmp_path_factory.mktemp("resume2"))


def assert_same(whole: Path, resumed: Path) -> None:
    steps = column(resumed, "step")
    assert steps == list(range(1, 9))
    for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "cost/backward_tokens", "epoch"):
        assert column(resumed, name) == column(whole, name), name
    ours, theirs = weights(resumed / "final"), weights(whole / "final")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    old = [
        json.loads(line)["step"] for line in (resumed / "metrics.superseded.jsonl").read_text().splitlines()
    ]
    assert set(old) <= {5, 6, 7, 8}
    assert sorted(p.name for p in (resumed / "checkpoints").iterdir()) == ["step_4", "step_8"]


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_on_one_rank(one, name):
    """Also: the half-written .step_8.tmp of a kill is ignored, then replaced."""
    assert_same(one / "whole" / name, one / "resumed" / name)


@pytest.mark.parametrize("name", TWO)
def test_resume_on_two_ranks(two, name):
    assert_same(two / "whole" / name, two / "resumed" / name)


def on_ranks(run_dir: Path, world_size: int) -> Path:
    config = run_dir / "config.yaml"
    text, found = re.subn("(?m)^world_size: .*", f"world_size: {world_size}", config.read_text())
    assert found == 1
    config.write_text(text)
    return run_dir


def reset_moments(checkpoint: Path) -> None:
    import sage.model.engine  # noqa: F401  lets torch load DeepSpeed's classes

    (file,) = checkpoint.rglob("*optim_states.pt")
    shard = torch.load(file, weights_only=True)
    shard["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"].zero_()
    torch.save(shard, file)
    seal(checkpoint)


UP = ("zero0", "zero2", "zero3", "lora3", "bf16_0")


@pytest.fixture(scope="session")
def moved(one, two, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Runs that began on some ranks, stopped after step 4 and ended on others, with the undisturbed run."""
    root = tmp_path_factory.mktemp("moved")
    found = {}

    def stopped(ranks: str, name: str, run_dir: Path, whole: Path, step: int = 4) -> Path:
        run = on_ranks(interrupted(run_dir, step, root / ranks / name), int(ranks[-1]))
        found[f"{ranks}, {name}"] = run, whole / "whole" / name.split()[0]
        return run

    up = {name: stopped("1 to 2", name, one / "whole" / name, one) for name in UP}
    for run in up.values():  # so that the new ranks write a checkpoint before the end
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("save_every: 4", "save_every: 2"))
    mutant = stopped("1 to 2", "zero2 mutant", one / "whole" / "zero2", one)
    reset_moments(mutant / "checkpoints" / "step_4")
    execute(2, [*up.values(), mutant])
    down = [stopped("2 to 1", name, two / "whole" / name, two) for name in TWO]
    back = [stopped("1 to 2 to 1", name, up[name], one, step=6) for name in ("zero2", "zero3")]
    execute(1, [*down, *back])
    execute(4, [stopped("2 to 4", name, two / "whole" / name, two) for name in ("zero2", "zero3")])
    assert not list(root.rglob(ERROR_FILE))
    return found


def test_resume_on_another_number_of_ranks(moved):
    """Stages 0 to 3, LoRA and bfloat16. The run without Adam's moments shows that the losses notice."""
    for name, (run, whole) in moved.items():
        lines = map(json.loads, (run / "metrics.superseded.jsonl").read_text().splitlines())
        again = [line["step"] for line in lines if "loss" in line]
        assert again == [5, 6, 7, 8] + ([7, 8] if "1 to 2 to 1" in name else []), name
        assert column(run, "step") == list(range(1, 9)), name
        differs = largest_difference(column(run, "loss"), column(whole, "loss"))
        bound = 1e-4 if "bf16" in name else 1e-5  # other rows, so gradients are rounded in another order
        assert (differs < bound) == ("mutant" not in name), (name, differs)
        assert json.loads((run / "summary.json").read_text())["world_size"] == int(name.split(",")[0][-1])


def zero_a_hole(file: Path) -> None:
    """4 KiB of zeros in the middle, as a disk may leave them. The file can still be loaded."""
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        content.write(bytes(4096))


DAMAGE = {
    "hole": lambda folder: zero_a_hole(max(folder.rglob("*.pt"), key=lambda file: file.stat().st_size)),
    "truncated": lambda folder: os.truncate(next(folder.rglob("*model_states.pt")), 1000),
    "missing": lambda folder: next(folder.rglob("*model_states.pt")).unlink(),
    "sidecar": lambda folder: (folder / "train_state.pt").unlink(),
    "checksums": lambda folder: (folder / CHECKSUMS_FILE).write_text("{}"),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(one, tmp_path):
    """Above all a hole of zeros, which would be resumed with other weights. Without any, the run starts."""
    whole = one / "whole" / "zero2"
    runs = {name: interrupted(whole, 8, tmp_path / name) for name in (*DAMAGE, "both")}
    for name, run in runs.items():
        shutil.copytree(run / "checkpoints" / "step_4", run / "checkpoints" / "step_4.bak")
        for step in ("step_8",) if name in DAMAGE else ("step_4", "step_8"):
            DAMAGE.get(name, DAMAGE["hole"])(run / "checkpoints" / step)
    execute(1, list(runs.values()))
    for name, run in runs.items():
        assert not (run / ERROR_FILE).exists(), name
        assert column(run, "step") == list(range(1, 9)) and column(run, "loss") == column(whole, "loss"), name
        ours, theirs = weights(run / "final"), weights(whole / "final")
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), name
        assert (run / "checkpoints" / "step_8.damaged").is_dir()
        assert (run / "checkpoints" / "step_4.damaged").is_dir() == (name == "both")


def test_an_adapters_checkpoint_leaves_its_frozen_base_out(one):
    import sage.model.engine  # noqa: F401  lets torch load DeepSpeed's classes

    for name in ("lora0", "lora3"):
        (file,) = (one / "whole" / name / "checkpoints" / "step_8").rglob("*model_states.pt")
        state = torch.load(file, weights_only=True)
        assert all("lora_" in weight for weight, value in state["module"].items() if value.numel()), name
        assert not state.get("frozen_param_fragments"), name


def test_kill_and_resume(two, common, tmp_path):
    """The real thing: `sage train` on two ranks under ZeRO-2, kill -9 of all its processes, `sage resume`."""
    run = tmp_path / "run"
    words = [sys.executable, "-m", "sage", "train", *common, "world_size=2", "engine=zero2"]
    process = subprocess.Popen([*words, f"hydra.run.dir={run}"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not (run / "checkpoints" / "step_4").exists():
        assert process.poll() is None
        time.sleep(0.002)
    family = [
        *psutil.Process(process.pid).children(recursive=True),
        process,
    ]  # ranks have process groups of their own
    for member in family:
        member.kill()
    process.wait()
    assert not (run / "summary.json").exists()
    status, said = command("resume", str(run)).end()
    assert status == 0 and "resumed from" in said, said
    assert column(run, "step") == list(range(1, 9))
    assert column(run, "loss") == column(two / "whole" / "zero2", "loss")
    ours, theirs = weights(run / "final"), weights(two / "whole" / "zero2" / "final")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    status, said = command("resume", str(run)).end()
    assert status == 2 and "finished" in said


def test_a_run_that_starts_again_says_so(tmp_path, capsys):
    """A resume without a checkpoint does all steps once more, which nobody should take for a continuation."""
    state, selection = SimpleNamespace(step=0), SimpleNamespace(log=SimpleNamespace(rewind=lambda step: None))
    arguments: Any = (None, None, selection, state)
    assert restore(tmp_path, *arguments) is state and capsys.readouterr().out == ""
    (tmp_path / "metrics.jsonl").touch()
    restore(tmp_path, *arguments)
    assert "has no checkpoint, so it starts again from its first step" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_rank_that_still_runs_is_not_joined(common, tmp_path):
    """Protects a run from two writers: after kill -9 of the launcher alone its ranks run on for a step."""
    run = freeze(tmp_path / "run", *common)
    with FileLock(run / ".rank0.lock"):
        status, said = command("resume", str(run)).end()
    assert status == 2 and "rank 0" in said and "still running" in said
    assert not (run / "metrics.jsonl").exists()


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_cannot_be_resumed_is_refused(one, common, tmp_path):
    """Other data, a shard that is missing, and checkpoints that would run code when unpickled."""
    whole = one / "whole" / "zero0"
    data = interrupted(whole, 4, tmp_path / "data")
    ranks = interrupted(one / "whole" / "zero2", 4, tmp_path / "ranks")
    other = write_jsonl(tmp_path / "other.jsonl", make_pairs(21)[1:])
    text = (data / "config.yaml").read_text()
    path = next(c for c in common if c.startswith("data.path=")).split("=", 1)[1]
    (data / "config.yaml").write_text(text.replace(path, str(other)))
    sidecar = ranks / "checkpoints" / "step_4" / "train_state.pt"
    torch.save({**torch.load(sidecar, weights_only=True), "world_size": 4}, sidecar)
    seal(sidecar.parent)

    versions = {}
    for name, reason in (
        ("older", "(KeyError: 'queue')"),
        ("newer", "(TypeError: "),
        ("adam", "holds the state of FusedAdam, and this run's optimizer is AdamW"),
        ("inputs", "that began with different content of data.eval_path"),
        ("tokenizer", "began with different content of the tokenizer or the chat template"),
        ("head", "with padded rows and the triton head, and here the self-check chooses shared rows"),
    ):
        run = interrupted(whole, 4, tmp_path / name)
        versions[run] = reason
        sidecar = run / "checkpoints" / "step_4" / "train_state.pt"
        state = torch.load(sidecar, weights_only=True)
        assert state["optimizer"] == "AdamW"
        if name == "older":
            del state["selection"]["queue"]
        elif name == "inputs":
            state["inputs"] = {"data.eval_path": "of other pairs"}
        elif name == "tokenizer":
            assert state["inputs"].pop("the tokenizer or the chat template")
            state["inputs"]["the tokenizer or the chat template"] = "of another model"
        elif name == "head":
            assert state["computation"] == "shared rows and the tiled head"
            state["computation"] = "padded rows and the triton head"
        else:
            state["optimizer" if name == "adam" else "surprise"] = "FusedAdam"
        torch.save(state, sidecar)
        seal(sidecar.parent)

    evil = {}
    for name, variant, pattern in (
        ("sidecar", "zero0", "train_state.pt"),
        ("model", "zero0", "*model_states.pt"),
        ("optimizer", "zero2", "*optim_states.pt"),
        ("shard", "zero3", "*optim_states.pt"),
    ):
        run = evil[name] = interrupted(one / "whole" / variant, 4, tmp_path / name)
        (file,) = (run / "checkpoints" / "step_4").rglob(pattern)
        payload = Payload(tmp_path / f"{name}.executed")
        if name in ("sidecar", "model"):
            torch.save({"module": payload}, file)
        else:
            file.write_bytes(pickle.dumps(payload))
        seal(run / "checkpoints" / "step_4")
    before = {run: (run / "metrics.jsonl").read_text() for run in (data, ranks, *versions, *evil.values())}
    execute(1, list(before))
    assert "data.path or data.sources no longer holds the pairs that" in (data / ERROR_FILE).read_text()
    assert "the optimizer's state of rank 1 is not there" in (ranks / ERROR_FILE).read_text()
    for run, reason in versions.items():
        error = (run / ERROR_FILE).read_text()
        assert f"{run}/checkpoints/step_4 " in error and reason in error
        assert "start a new run" in error and not (run / "final").exists()
    for name, run in evil.items():
        assert (run / ERROR_FILE).exists() and not (run / "final").exists()
        assert "was not written by sage" in (run / ERROR_FILE).read_text(), name
        assert not (tmp_path / f"{name}.executed").exists()
    for run, text in before.items():
        assert (run / "metrics.jsonl").read_text() == text  # refused before anything is touched
        assert metrics(run)

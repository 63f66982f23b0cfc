"""sage on a GPU gives the numbers that it gives on the CPU.

`make gpu` runs this, and so does `SAGE_TEST_GPU=1 pytest tests/test_gpu.py`. Each run has its own process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CPU, GPU = {"CUDA_VISIBLE_DEVICES": ""}, {}
TRAIN = [
    *("train", "+experiment=arithmetic", "steps=6", "eval_every=3", "batch_size=16", "data.limit=300"),
    "data.eval_limit=64",
]
FLOAT32 = "model.dtype=float32"
SETTINGS = {
    "defaults": [],
    "plain DPO": ["+baseline=dpo"],
    "a benchmark": ["+benchmark=arithmetic", "benchmark_limit=32"],
    "rows padded": ["data.packing=padded"],
    "prompts not shared": ["data.packing=unshared"],
    "all logits": ["model.head=oracle"],
    "tiled logits": ["model.head=tiled"],
    "logit statistics": ["scorer=sage_logit"],
    "hardest first": ["curriculum=static_filter"],
    "reference online": ["reference=online"],
    "signal to noise": ["tracking.snr_every=2"],
    "LoRA": ["+model/lora=default"],
    "tiled MLP": ["model.tiled_mlp=true"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "activations offloaded": ["model.gradient_checkpointing=offload"],
    "torch's AdamW": ["optimizer.implementation=torch"],
    **{name: [f"engine={name}"] for name in ("zero1", "zero2", "zero3")},
    **{name: [f"engine={name}"] for name in ("zero1_offload", "zero2_offload", "zero3_offload")},
}
NUMBERS = (
    "loss",
    "rewards/margins",
    "grad_norm",
    "eval/loss",
    "eval/logps/chosen",
    "benchmark/arithmetic/accuracy",
)


def environment(place: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", **place}


def sage(*words: str | Path, place: dict[str, str] = GPU) -> str:
    command = [sys.executable, "-m", "sage", *map(str, words)]
    done = subprocess.run(command, env=environment(place), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2500:]
    return done.stdout


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def columns(run_dir: Path) -> dict[str, list[float]]:
    """The NUMBERS of a run, in order."""
    lines = metrics(run_dir)
    return {name: [line[name] for line in lines if name in line] for name in NUMBERS}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_has_the_same_numbers_as_on_the_cpu(name, tmp_path):
    for folder, place in (("gpu", GPU), ("cpu", CPU)):
        cache = f"cache_dir={tmp_path / folder}_cache"
        sage(*TRAIN, FLOAT32, *SETTINGS[name], cache, f"hydra.run.dir={tmp_path / folder}", place=place)
    gpu, cpu = columns(tmp_path / "gpu"), columns(tmp_path / "cpu")
    assert len(cpu["loss"]) == 6 and len(cpu["eval/loss"]) == 3
    for column, values in cpu.items():
        assert gpu[column] == pytest.approx(values, rel=2e-3, abs=2e-4), column


def test_bfloat16_is_the_default_and_close_to_float32(tmp_path):
    sage(*TRAIN, "+baseline=dpo", f"hydra.run.dir={tmp_path / 'bf16'}")
    sage(*TRAIN, "+baseline=dpo", FLOAT32, f"hydra.run.dir={tmp_path / 'f32'}")
    found, exact = columns(tmp_path / "bf16"), columns(tmp_path / "f32")
    assert found["loss"] != exact["loss"]
    for column in ("loss", "eval/loss", "eval/logps/chosen"):
        assert found[column] == pytest.approx(exact[column], rel=0.03, abs=0.03)


@pytest.mark.parametrize("overrides", [[], ["+model/lora=default"], ["engine=zero2"], ["engine=zero3"]])
def test_a_killed_run_goes_on_exactly(overrides, tmp_path):
    """Bit for bit, in the default bfloat16."""
    words = [*TRAIN, *overrides, "steps=20", "save_every=2", "+benchmark=arithmetic", "benchmark_limit=16"]
    sage(*words, f"hydra.run.dir={tmp_path / 'whole'}")
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "sage", *words, f"hydra.run.dir={killed}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, env=environment(GPU), stdout=log, stderr=log, start_new_session=True
        )
    while process.poll() is None and not (killed / "checkpoints" / "step_4").exists():
        time.sleep(0.02)
    assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    sage("resume", killed)
    assert columns(killed) == columns(tmp_path / "whole")
    for file in (tmp_path / "whole" / "final").glob("*.safetensors"):
        assert file.read_bytes() == (killed / "final" / file.name).read_bytes()


def test_the_other_commands_give_what_they_give_on_the_cpu(tmp_path):
    model = ["model=arithmetic", FLOAT32]
    for folder, place in (("gpu", GPU), ("cpu", CPU)):
        own, cache = tmp_path / folder, f"cache_dir={tmp_path / folder}_cache"
        data = ["+experiment=arithmetic", FLOAT32, "data.limit=200", "data.eval_path=null"]
        sage("score-dataset", *data, cache, f"hydra.run.dir={own / 'scores'}", place=place)
        words = ["eval", *model, "benchmark=arithmetic", "benchmark_limit=100", cache]
        sage(*words, f"hydra.run.dir={own / 'eval'}", place=place)
        problems = [
            "data.problems.path=pkg://sage.assets/arithmetic/problems_train.jsonl",
            "data.problems.limit=40",
        ]
        sage("build-pairs", *model, *problems, cache, f"hydra.run.dir={own / 'pairs'}", place=place)
    scores = [pq.read_table(tmp_path / folder / "scores" / "scores").to_pydict() for folder in ("gpu", "cpu")]
    for name, values in scores[1].items():
        if isinstance(values[0], float):
            assert scores[0][name] == pytest.approx(values, rel=1e-3, abs=1e-3), name
    found = [json.loads((tmp_path / f / "eval" / "summary.json").read_text()) for f in ("gpu", "cpu")]
    assert found[0]["mean_accuracy"] == found[1]["mean_accuracy"]
    rows = [(tmp_path / f / "pairs" / "generations.jsonl").read_text().splitlines() for f in ("gpu", "cpu")]
    same = sum(a == b for a, b in zip(*rows, strict=True))
    assert same >= 0.9 * len(rows[0])  # a draw at the edge of two tokens may fall to either side


def test_rounds_and_a_continued_optimizer(tmp_path):
    words = [
        "rounds",
        "+experiment=arithmetic",
        "rounds=2",
        "steps=6",
        "data.problems.limit=100",
        "round.optimizer=continued",
    ]
    sage(*words, f"hydra.run.dir={tmp_path / 'rounds'}")
    assert (tmp_path / "rounds" / "summary.json").exists()
    sage("report", tmp_path / "rounds")


def test_doctor_finds_no_fault(tmp_path):
    sage("doctor", f"json={tmp_path / 'doctor.json'}")

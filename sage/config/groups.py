"""The config groups that commands share: each key, its type, its default and what it means."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING


def key(
    default: Any, help: str, *, choices: tuple = (), low: float | None = None, high: float | None = None
) -> Any:
    """A config key: its default, the sentence that documents it, and the values it admits."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class LoraConfig:
    r: int = key(16, "rank of the adapter", low=1)
    alpha: float = key(32.0, "scale of the adapter's output is alpha / r", low=0)
    dropout: float = key(0.0, "dropout on the adapter's input", low=0, high=1)
    targets: list[str] = key(
        ["all-linear"], "module names that get an adapter; all-linear = every linear but the head"
    )


@dataclass
class ModelConfig:
    path: str = key(
        MISSING,
        "local folder, hub name, or pkg://PACKAGE/NAME, a folder or .gguf file of an installed package",
    )
    revision: str | None = key(None, "commit or tag of a hub model")
    dtype: str = key(
        "auto",
        "dtype of the compute; auto = bfloat16 where the device has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = key(
        "auto",
        "attention where rows are padded; auto = sdpa where the model supports it, else eager",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    head: str = key(
        "auto",
        "computes log-probabilities from hidden states; auto = triton for bfloat16 on CUDA, else tiled; oracle keeps all logits",
        choices=("auto", "tiled", "triton", "oracle"),
    )
    gradient_checkpointing: bool = key(
        False, "recompute activations in backward: less memory, a third more time"
    )
    allow_missing: bool = key(
        False, "accept a model whose files lack weights (random values replace them) or have others"
    )
    router_aux_coef: float | None = key(
        None,
        "coefficient of the load-balancing loss of a mixture of experts, added to the loss; null = that of the "
        "model's own config where it sets output_router_logits, else 0",
        low=0,
    )
    trust_remote_code: bool = key(False, "run Python code that the model repository ships")
    lora: LoraConfig | None = key(None, "train a LoRA adapter instead of all weights (+model/lora=default)")
    adapter_path: str | None = key(None, "go on from this peft adapter; it is then also the reference")


@dataclass
class Columns:
    """Maps our column names to those of the source. null = the source uses our name, or has no such column."""

    def given(self) -> dict[str, str]:
        """Our name -> the source's, for the columns that the user mapped."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass
class ProblemColumns(Columns):
    problem_id: str | None = key(None, "the source's column of ids; without one, rows are numbered")
    prompt: str | None = key(None, "the source's column of problem texts; A+B joins two columns")
    answer: str | None = key(None, "the source's column of answers")
    solution: str | None = key(None, "the source's column of solutions, which pairing.chosen=gold uses")
    group: str | None = key(None, "the source's column of topics or levels; accuracy is also given per group")


@dataclass
class ProblemsConfig:
    path: str | None = key(
        None,
        "problems: JSONL, JSON, Parquet, an Arrow folder, or a hub name (OWNER/NAME:SUBSET); null = none",
    )
    split: str = key("test", "split of a hub dataset or an Arrow DatasetDict")
    columns: ProblemColumns = field(default_factory=ProblemColumns)
    answer_from: str = key(
        "plain",
        "how the answer stands in its column: after ####, in the last \\boxed{}, or alone",
        choices=("hash", "boxed", "plain"),
    )
    limit: int | None = key(None, "use only the first N problems", low=1)
    prompt: str = key(
        "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "what the policy is asked, around {problem}",
    )


@dataclass
class ChatConfig:
    """How prompts become the text that the model reads; the same keys in every command."""

    chat_template: bool | str = key(
        True,
        "true = the tokenizer's chat template; false = plain text; else one of its named templates or a .jinja file",
    )
    template_arguments: dict[str, Any] = key(
        {}, "variables for the chat template, as in +data.template_arguments.enable_thinking=false"
    )


@dataclass
class PairColumns(Columns):
    """The source's column of each thing. "" = it has none, even if a column has our name."""

    pair_id: str | None = key(None, "ids; without one, rows are numbered")
    prompt: str | None = key(None, "prompts, text or messages; a.b is b inside the column a")
    chosen: str | None = key(None, "better responses")
    rejected: str | None = key(None, "worse responses")
    system: str | None = key(None, "texts of the system message")
    input: str | None = key(None, "texts that follow the prompt after a line break (Alpaca)")
    history: str | None = key(None, "earlier turns, a list of [user's text, assistant's text] (Alpaca)")
    started: str | None = key(None, "texts that begin the answer and that both responses continue (Step-DPO)")
    tools: str | None = key(None, "lists of tools for the chat template")
    answer: str | None = key(None, "true answers, for data.answers")
    pass_rate: str | None = key(None, "pass rates, from 0 to 1")


@dataclass
class DataConfig(ChatConfig):
    path: str | None = key(
        None,
        "training pairs: JSONL, JSON, Parquet, an Arrow folder, a hub name or pkg://; null = built from data.problems",
    )
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    build: str = key(
        "missing",
        "whether `sage train` first builds the pairs of data.problems where its cache has none",
        choices=("missing", "never"),
    )
    split: str = key("train", "split of a hub dataset or an Arrow DatasetDict")
    eval_path: str | None = key(None, "held-out pairs, in any of the same forms; null = no evaluation")
    eval_split: str = key("test", "split of the held-out pairs")
    scores: str | None = key(
        None,
        "run directory of `sage score-dataset`: reference log-probabilities of the training pairs, and more",
    )
    limit: int | None = key(None, "use only the first N training pairs", low=1)
    eval_limit: int | None = key(None, "use only the first N held-out pairs", low=1)
    columns: PairColumns = field(default_factory=PairColumns)
    max_bad: float = key(
        0.01, "largest share of bad rows; they are dropped and counted, and more are refused", low=0, high=1
    )
    max_length: int = key(
        2048, "pairs whose prompt + longest response exceed this are dropped and counted", low=2
    )
    num_proc: int = key(1, "processes that tokenise", low=1)
    packing: str = key(
        "auto",
        "shared: no padding, and text that prompts have in common is computed once; unshared: no padding; "
        "padded: one row per response; auto = shared where the model's attention allows it, else padded",
        choices=("auto", "shared", "unshared", "padded"),
    )
    list_dropped: bool = key(False, "write every dropped pair and its reason to RUN_DIR/dropped.jsonl")


@dataclass
class OptimizerConfig:
    lr: float = key(5e-7, "peak learning rate", low=0)
    betas: tuple[float, float] = key((0.9, 0.999), "Adam's decay rates")
    eps: float = key(1e-8, "Adam's epsilon", low=0)
    weight_decay: float = key(0.0, "decoupled weight decay, of matrices alone", low=0)
    max_grad_norm: float = key(1.0, "clip the global gradient norm to this; 0 = never", low=0)
    schedule: str = key("cosine", "after warm-up", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = key(
        0.1, "share of all steps over which the rate rises linearly from 0", low=0, high=1
    )
    min_lr_ratio: float = key(0.0, "the schedule ends at this share of the peak", low=0, high=1)
    implementation: str = key(
        "auto",
        "auto = DeepSpeed's CPU or fused Adam where it builds, else torch's",
        choices=("auto", "torch"),
    )


@dataclass
class EngineConfig:
    zero_stage: int = key(
        0, "0 replicates; 1 shards optimizer state; 2 gradients too; 3 weights too", low=0, high=3
    )
    offload: bool = key(False, "keep optimizer state (and weights under stage 3) in CPU memory")


@dataclass
class TrackingConfig:
    wandb: bool = key(False, "also log to Weights & Biases")
    mode: str = key(
        "auto",
        "auto = online when logged in, else offline",
        choices=("auto", "online", "offline"),
    )
    project: str = key("sage", "Weights & Biases project")
    sample_rows: int = key(
        1_000_000, "rows kept in samples/*.parquet, the log of scored pairs; 0 = no such log", low=0
    )
    snr_every: int = key(
        0,
        "steps between measurements of the updates' signal-to-noise ratio; each costs a second backward; 0 = none",
        low=0,
    )


@dataclass
class SamplingConfig:
    temperature: float = key(1.0, "0 = greedy", low=0)
    top_p: float = key(1.0, "sample from the fewest likeliest tokens whose mass reaches this", low=0, high=1)
    max_new_tokens: int = key(1024, "a response is cut off after this many tokens", low=1)
    stop: list[str] = key([], "a response also ends before the first of these texts")


@dataclass
class PairingConfig:
    samples: int = key(4, "responses sampled per problem", low=1)
    chosen: str = key(
        "own",
        "where chosen comes from: right responses of the policy, the problem's solution, or the first that exists",
        choices=("own", "gold", "own_then_gold"),
    )
    per_problem: int = key(1, "most pairs of one problem", low=1)
    max_length_ratio: float | None = key(
        None, "longer over shorter response of a pair, in characters, is at most this", low=1
    )
    near_duplicate: float = key(
        0.9,
        "responses whose word triples overlap (Jaccard) by this much are one; 1 = only equal ones",
        low=0,
        high=1,
    )
    unparsable: float = key(
        1.0, "largest share of pairs whose rejected has no answer: 1 keeps them, 0 drops them", low=0, high=1
    )
    truncated: float = key(
        1.0, "largest share of pairs whose rejected was cut off: 1 keeps them, 0 drops them", low=0, high=1
    )

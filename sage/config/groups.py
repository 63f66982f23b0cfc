"""The config groups that commands share: each key with its type, its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING


def key(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    length: int | None = None,
) -> Any:
    """A config key: its default, the sentence that documents it, and the values that it accepts.

    `low` and `high` are allowed values, `above` and `below` are not. For a list they bound each item.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "length": length,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class LoraConfig:
    r: int = key(16, "rank of the adapter", low=1)
    alpha: float = key(32.0, "the adapter's output is scaled by alpha / r", low=0)
    dropout: float = key(0.0, "dropout on the adapter's input", low=0, below=1)
    targets: list[str] = key(
        ["all-linear"],
        "names of the modules that get an adapter; all-linear = all linear layers but the head",
    )


@dataclass
class ModelConfig:
    path: str = key(
        MISSING,
        "local folder, hub name, or pkg://PACKAGE/NAME: a folder or .gguf file in an installed package",
    )
    revision: str | None = key(None, "commit or tag of a hub model")
    dtype: str = key(
        "auto",
        "dtype of the computation; auto = bfloat16 if the hardware has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = key(
        "auto",
        "attention implementation for padded rows; auto = sdpa if the model supports it, else eager",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
    )
    head: str = key(
        "auto",
        "computes log-probabilities from hidden states; auto = triton for bfloat16 on CUDA, else tiled; "
        "oracle keeps all logits in memory",
        choices=("auto", "tiled", "triton", "oracle"),
    )
    gradient_checkpointing: bool = key(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    allow_missing: bool = key(
        False, "accept a model whose files lack weights (random values replace them) or have others"
    )
    router_aux_coef: float | None = key(
        None,
        "coefficient of the load-balancing loss of a mixture of experts, which is added to the loss; "
        "null = the coefficient in the model's own config if that sets output_router_logits, else 0",
        low=0,
    )
    trust_remote_code: bool = key(False, "run Python code that the model repository ships")
    lora: LoraConfig | None = key(None, "train a LoRA adapter instead of all weights: +model/lora=default")
    adapter_path: str | None = key(
        None, "start from this peft adapter, which is then also the reference; needs +model/lora=default"
    )


@dataclass
class Columns:
    """Maps our column names to the source's. null = the source uses our name, or has no such column."""

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
    samples: str | None = key(
        None, "a column of how many responses to sample to each problem, instead of pairing.samples"
    )


@dataclass
class ResponseColumns(Columns):
    response: str | None = key(None, "the source's column of responses")
    answer: str | None = key(None, "the source's column of true answers")


@dataclass
class ProblemsConfig:
    path: str | None = key(
        None,
        "problems: JSONL, JSON, Parquet, an Arrow folder, or a hub name (OWNER/NAME:SUBSET); null = none",
    )
    split: str = key(
        "test", "split of a hub dataset or an Arrow DatasetDict; for a file, what its problems are for"
    )
    columns: ProblemColumns = field(default_factory=ProblemColumns)
    answer_from: str = key(
        "plain",
        "where the answer is in its column: after ####, in the last \\boxed{}, or the whole text",
        choices=("hash", "boxed", "plain"),
    )
    limit: int | None = key(None, "use only the first N problems", low=1)
    prompt: str = key(
        "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "the prompt of each problem; {problem} is replaced by the problem's text",
    )


@dataclass
class ChatConfig:
    """How prompts become the text that the model reads. Every command has these keys."""

    chat_template: bool | str = key(
        True,
        "true = the tokenizer's chat template; false = plain text; else one of its named templates "
        "or a .jinja file",
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
    chosen_reasoning: str | None = key(None, "the better responses' thoughts, where they are apart")
    rejected_reasoning: str | None = key(None, "the worse responses' thoughts, where they are apart")
    answer: str | None = key(None, "true answers, for data.answers")
    pass_rate: str | None = key(None, "pass rates, from 0 to 1")


@dataclass
class DataConfig(ChatConfig):
    path: str | None = key(
        None,
        "training pairs: JSONL, JSON, Parquet, an Arrow folder, a hub name or pkg://; "
        "null = built from data.problems",
    )
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    build: str = key(
        "missing",
        "missing = `sage train` builds the pairs of data.problems if cache_dir does not have them; "
        "never = it stops instead",
        choices=("missing", "never"),
    )
    split: str = key("train", "split of a hub dataset or an Arrow DatasetDict")
    eval_path: str | None = key(
        None, "held-out pairs, in the same formats as data.path; null = no evaluation"
    )
    eval_split: str = key("test", "split of the held-out pairs")
    scores: str | None = key(
        None, "run directory of `sage score-dataset`, whose reference log-probabilities are reused"
    )
    limit: int | None = key(None, "use only the first N training pairs", low=1)
    eval_limit: int | None = key(None, "use only the first N held-out pairs", low=1)
    columns: PairColumns = field(default_factory=PairColumns)
    max_bad: float = key(
        0.01, "largest share of bad rows; they are dropped and counted, and more are refused", low=0, high=1
    )
    answers: str | None = key(
        None,
        "verify both responses of pairs that have an answer; drop = drop pairs whose chosen is wrong "
        "or whose rejected is right; check = only count and list them",
        choices=(None, "check", "drop"),
    )
    max_length: int = key(
        2048, "pairs whose prompt + longer response have more tokens are dropped and counted", low=2
    )
    num_proc: int | None = key(None, "processes that tokenise; null = one per CPU core", low=1)
    packing: str = key(
        "auto",
        "shared: no padding, and text that prompts have in common is computed once; unshared: no padding; "
        "padded: one row per response; auto = shared if the model's attention allows it, else padded",
        choices=("auto", "shared", "unshared", "padded"),
    )
    list_dropped: bool = key(
        True, "write every dropped row and pair, with its reason, to RUN_DIR/dropped.jsonl"
    )


@dataclass
class OptimizerConfig:
    lr: float = key(5e-7, "peak learning rate", low=0)
    betas: tuple[float, float] = key((0.9, 0.999), "Adam's decay rates", low=0, below=1, length=2)
    eps: float = key(1e-8, "Adam's epsilon", low=0)
    weight_decay: float = key(0.0, "decoupled weight decay, applied to matrices only", low=0)
    max_grad_norm: float = key(1.0, "clip the global gradient norm to this value; 0 = never", low=0)
    schedule: str = key("cosine", "learning rate after warm-up", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = key(
        0.1, "share of all steps in which the learning rate rises linearly from 0", low=0, high=1
    )
    min_lr_ratio: float = key(0.0, "the schedule ends at this share of the peak", low=0, high=1)
    implementation: str = key(
        "auto",
        "auto = DeepSpeed's CPU or fused Adam if it can be built, else torch's",
        choices=("auto", "torch"),
    )


@dataclass
class EngineConfig:
    zero_stage: int = key(
        0, "0 replicates all state; 1 shards optimizer state; 2 also gradients; 3 also weights", low=0, high=3
    )
    offload: bool = key(False, "keep optimizer state, and weights under stage 3, in CPU memory")


@dataclass
class TrackingConfig:
    wandb: bool = key(False, "also log to Weights & Biases")
    tensorboard: bool = key(False, "also write event files for TensorBoard to RUN_DIR/tensorboard")
    mode: str = key(
        "auto",
        "how Weights & Biases logs; auto = online if you are logged in and it answers, else offline",
        choices=("auto", "online", "offline"),
    )
    project: str = key("sage", "Weights & Biases project, or ENTITY/PROJECT")
    sample_rows: int = key(
        1_000_000, "rows to keep in samples/*.parquet, the log of scored pairs; 0 = no such log", low=0
    )
    snr_every: int = key(
        0,
        "steps between measurements of the updates' signal-to-noise ratio, each of which costs a "
        "second backward pass; 0 = none",
        low=0,
    )


@dataclass
class SamplingConfig:
    temperature: float = key(1.0, "0 = greedy", low=0)
    top_p: float = key(
        1.0, "sample from the smallest set of tokens whose probability reaches this", above=0, high=1
    )
    max_new_tokens: int = key(1024, "a response is cut off after this many tokens", low=1)
    stop: list[str] = key([], "a response also ends before the first of these texts")


@dataclass
class PairingConfig:
    samples: int = key(4, "responses sampled per problem", low=1)
    chosen: str = key(
        "own",
        "source of the chosen response: own = a correct response of the policy; gold = the problem's "
        "solution; own_then_gold = the solution if no response is correct",
        choices=("own", "gold", "own_then_gold"),
    )
    rejected_from: list[str] = key(
        [],
        "folders of finished `sage build-pairs`, best of weaker policies: a problem takes its rejected "
        "responses from the first one with wrong answers to it; own ones are for problems without any",
    )
    per_problem: int = key(1, "at most this many pairs per problem", low=1)
    max_length_ratio: float | None = key(
        None, "in a pair, the longer response has at most this many times the shorter one's characters", low=1
    )
    near_duplicate: float = key(
        0.9,
        "responses whose word triples overlap by this much (Jaccard) count as one; 1 = only equal responses",
        low=0,
        high=1,
    )
    unparsable: float = key(
        1.0,
        "largest share of pairs whose rejected response has no answer: 1 = keep all, 0 = drop all",
        low=0,
        high=1,
    )
    truncated: float = key(
        1.0,
        "largest share of pairs whose rejected response was cut off: 1 = keep all, 0 = drop all",
        low=0,
        high=1,
    )

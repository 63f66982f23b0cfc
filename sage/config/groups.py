"""The config groups that commands share: each key with its type, its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    gradient_checkpointing: bool | str = key(
        False,
        "recompute activations in the backward pass: less memory, a third more time; offload = also keep the "
        "hidden states of the layers in CPU memory until then",
        choices=(False, True, "offload"),
    )
    tiled_mlp: bool = key(
        False,
        "compute MLPs and experts in tiles of 4,096 tokens, and again in the backward pass: less memory for "
        "long texts",
    )
    allow_missing: bool = key(
        False,
        "accept a model whose files lack weights (the same random values replace them in every run) or have "
        "others",
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
class OptimizerConfig:
    lr: float = key(5e-7, "peak learning rate", low=0)
    betas: tuple[float, float] = key((0.9, 0.999), "Adam's decay rates", low=0, below=1, length=2)
    eps: float = key(1e-8, "Adam's epsilon", low=0)
    weight_decay: float = key(0.0, "decoupled weight decay, applied to matrices only", low=0)
    max_grad_norm: float = key(1.0, "clip the global gradient norm to this value; 0 = never", low=0)
    schedule: str = key("cosine", "learning rate after warm-up", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = key(
        0.1, "share of all steps in which the learning rate rises linearly to its peak", low=0, high=1
    )
    min_lr_ratio: float = key(0.0, "the schedule ends at this share of the peak", low=0, high=1)
    implementation: str = key(
        "auto",
        "auto = DeepSpeed's CPU or fused Adam if it can be built, else torch's",
        choices=("auto", "torch"),
    )
    continue_from: str | None = key(
        None,
        "begin with the optimizer's state that export_optimizer=true left beside the model or the adapter, "
        "for example RUN_DIR/final/optimizer; null = a fresh optimizer",
    )


@dataclass
class EngineConfig:
    zero_stage: int = key(
        0, "0 replicates all state; 1 shards optimizer state; 2 also gradients; 3 also weights", low=0, high=3
    )
    offload: bool = key(False, "keep optimizer state, and weights under stage 3, in CPU memory")
    sequence_parallel: int = key(
        1, "ranks that compute each row of tokens together, for pairs too long for one rank", low=1
    )


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
        "run directories of `sage build-pairs`, preferably with weaker policies: a problem takes its "
        "rejected responses from the first one with wrong answers to it, and its own ones if there is none",
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

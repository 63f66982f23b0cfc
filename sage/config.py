"""The schema of every command: each key, its type, its default, what it means; and the checks no type can express.

The dataclasses are registered with Hydra, so composition itself rejects unknown keys and wrong types. `check` looks at
what one key cannot know of another. It raises and never edits: what was composed is what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.utils import get_class
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sage.errors import UserError

CONFIG_FILE = "config.yaml"  # of a run directory: what runs
SUMMARY_FILE = "summary.json"  # written last: the run is finished


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
        "sdpa", "attention where rows are padded", choices=("sdpa", "eager", "flash_attention_2")
    )
    head: str = key(
        "auto",
        "computes log-probabilities from hidden states; auto = triton for bfloat16 on CUDA, else tiled; oracle keeps all logits",
        choices=("auto", "tiled", "triton", "oracle"),
    )
    gradient_checkpointing: bool = key(
        False, "recompute activations in backward: less memory, a third more time"
    )
    trust_remote_code: bool = key(False, "run Python code that the model repository ships")
    lora: LoraConfig | None = key(None, "train a LoRA adapter instead of all weights (+model/lora=default)")
    adapter_path: str | None = key(None, "go on from this peft adapter; it is then also the reference")


@dataclass
class ProblemsConfig:
    path: str = key(
        MISSING, "problems: JSONL, JSON, Parquet, an Arrow folder, or a hub name (OWNER/NAME:SUBSET)"
    )
    split: str = key("test", "split of a hub dataset or an Arrow DatasetDict")
    columns: dict[str, str] = key(
        {}, "our name -> theirs: problem_id, prompt (A+B joins two columns), answer, solution, group"
    )
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
class DataConfig:
    path: str | None = key(
        None,
        "training pairs: JSONL, JSON, Parquet, an Arrow folder, a hub name or pkg://; null = built from data.problems",
    )
    problems: ProblemsConfig | None = key(
        None, "problems that pairs are built from, by sampling and verifying"
    )
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
    columns: dict[str, str] = key(
        {}, "our column name -> theirs, e.g. {chosen: full_chosen, rejected: full_rejected}"
    )
    chat_template: bool = key(True, "wrap prompts and responses in the tokenizer's chat template")
    max_length: int = key(
        2048, "pairs whose prompt + longest response exceed this are dropped and counted", low=2
    )
    num_proc: int = key(1, "processes that tokenise", low=1)
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
    samples: int = key(
        1_000_000, "rows kept in samples/*.parquet, the log of scored pairs; 0 = no such log", low=0
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


@dataclass
class RunConfig:
    """What the config of every command has. A command's own class adds its keys, and `check` for combinations."""

    command: str = key(MISSING, "the command this config is for")
    name: str = key(MISSING, "names the run's folder")
    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = key(0, "seeds whatever is drawn: data order, dropout, selection, sampled responses", low=0)
    world_size: int = key(1, "ranks (processes) on this machine; one per GPU", low=1)
    cache_dir: str = key("~/.cache/sage", "converted models, tokenised pairs, reference log-probabilities")

    def check(self) -> None:
        """Raise UserError for values that are each allowed and cannot run together."""


@dataclass
class TrainConfig(RunConfig):
    command: str = key("train", "the command this config is for", choices=("train",))
    name: str = key("train", "names the run's folder")
    data: DataConfig = field(default_factory=DataConfig)
    loss: dict[str, Any] = key({}, "the objective: a class of sage.losses by _target_, and its fields")
    scorer: dict[str, Any] = key(
        {}, "which candidates get a gradient: a class of sage.scorers or yours by _target_"
    )
    curriculum: dict[str, Any] = key(
        {}, "which pairs are candidates: a class of sage.curriculum or yours by _target_"
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    generation: dict[str, Any] = key(
        {}, "the engine that samples responses: a class of sage.generation by _target_"
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    pairing: PairingConfig = field(default_factory=PairingConfig)
    steps: int | None = key(None, "optimizer steps; give this or epochs", low=1)
    epochs: float | None = key(None, "passes over the training pairs; give this or steps", low=0)
    batch_size: int = key(32, "pairs per optimizer step, over all ranks", low=1)
    micro_batch_tokens: int = key(16384, "tokens (padding included) of one forward of one rank", low=2)
    packing: str = key(
        "auto",
        "shared: no padding, each prompt computed once for both responses, and what all prompts begin with once a row; "
        "unshared: no padding; padded: a row per response; auto = shared where the model's attention admits it, else padded",
        choices=("auto", "shared", "unshared", "padded"),
    )
    reference: str = key(
        "cached",
        "reference log-probabilities: computed once and kept on disk, or by a second model in every step",
        choices=("cached", "online"),
    )
    eval_every: int = key(0, "steps between evaluations; 0 = only before and after", low=0)
    benchmark: dict[str, ProblemsConfig] = key(
        {}, "an evaluation also answers these problems, greedily, and reports accuracy (+benchmark=NAME)"
    )
    benchmark_limit: int = key(64, "the first N problems of each benchmark", low=1)
    save_every: int = key(0, "steps between checkpoints; 0 = none", low=0)
    keep_checkpoints: int = key(2, "newest checkpoints to keep", low=1)
    log_every: int = key(1, "steps between log lines", low=1)
    snr_every: int = key(
        0,
        "steps between measurements of the updates' signal-to-noise ratio, each a second backward; 0 = none",
        low=0,
    )

    def check(self) -> None:
        self.check_forward()
        for group in ("curriculum", "generation"):
            check_target(group, getattr(self, group))
        check_benchmarks(self.benchmark)
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give exactly one of steps=N and epochs=X (the other null)")
        if self.batch_size < self.world_size:
            raise UserError(
                f"batch_size={self.batch_size} pairs cannot feed world_size={self.world_size} ranks: raise it"
            )
        if self.engine.offload and self.engine.zero_stage == 0:
            raise UserError("engine.offload=true needs engine.zero_stage of 1, 2 or 3")
        if self.snr_every and self.engine.zero_stage == 3:
            raise UserError(
                f"snr_every={self.snr_every} needs whole gradients, which engine.zero_stage=3 never holds: use "
                "engine=zero2, or snr_every=0"
            )
        if self.snr_every and self.batch_size == 1:
            raise UserError(
                f"snr_every={self.snr_every}: a batch_size of 1 pair shows no noise: raise it, or set snr_every=0"
            )
        if self.data.scores and self.reference == "online":
            raise UserError("data.scores is a reference cache, so it needs reference=cached")

    def check_forward(self) -> None:
        """What a pass over the pairs needs, with or without training."""
        for group in ("loss", "scorer"):
            check_target(group, getattr(self, group))
        if self.data.path is None and self.data.problems is None:
            raise UserError(
                f"data.path is not set: give experiment {self.name!r} its preference pairs with data.path=FILE "
                "(JSONL, Parquet, an Arrow folder or a hub name with prompt, chosen and rejected), or problems to build "
                "them from with data.problems.path=FILE"
            )
        if self.data.max_length * 2 > self.micro_batch_tokens:
            raise UserError(
                f"micro_batch_tokens={self.micro_batch_tokens} cannot hold one pair of data.max_length="
                f"{self.data.max_length} (two rows): raise it to {self.data.max_length * 2}, or lower data.max_length"
            )
        if self.model.lora is None and self.model.adapter_path is not None:
            raise UserError("model.adapter_path needs an adapter to train: add +model/lora=default")


@dataclass
class BuildPairsConfig(TrainConfig):
    """An experiment is one plan, from problems to a policy. `sage build-pairs` carries out its first half, and takes
    all of its keys, so that `+experiment=NAME` means the same pairs here and in `sage train`."""

    command: str = key("build-pairs", "the command this config is for", choices=("build-pairs",))

    def check(self) -> None:
        check_target("generation", self.generation)
        if self.data.problems is None:
            raise UserError(
                "data.problems is not set: choose data=gsm8k, or give problems of your own with +data.problems.path=FILE"
            )
        check_prompt("data.problems", self.data.problems)


@dataclass
class ScoreConfig(TrainConfig):
    """`sage score-dataset` takes all keys of `sage train`, so that an experiment means the same model, pairs and scorer in
    both; those of training say nothing to it."""

    command: str = key("score-dataset", "the command this config is for", choices=("score-dataset",))
    name: str = key("scores", "names the run's folder")
    reference_model: str | None = key(
        None, "the reference, in any form of model.path; null = the policy is its own, as before training"
    )
    scorers: dict[str, dict[str, Any]] = key(
        {},
        "further scores: name -> a class of sage.scorers or yours by _target_; +scorer@scorers.NAME=OPTION adds one",
    )
    top: float | None = key(
        None, "write this share of the rows, those with the highest scores, to RUN_DIR/top as the input has them",
        low=0, high=1,
    )  # fmt: skip
    show: int = key(0, "print so many highest and lowest pairs", low=0)
    strata: int = key(4, "quantiles of difficulty, by which the summary is told", low=1)
    shard_pairs: int = key(1024, "pairs of a Parquet file; a killed run asks at most so many again", low=1)

    def check(self) -> None:
        self.check_forward()
        for name, node in self.scorers.items():
            check_target(f"scorers.{name}", node)
        if self.data.scores:
            raise UserError("data.scores is what score-dataset makes: leave it out")


@dataclass
class EvalConfig(RunConfig):
    command: str = key("eval", "the command this config is for", choices=("eval",))
    name: str = key("eval", "names the run's folder")
    benchmark: dict[str, ProblemsConfig] = key({}, "the problems of each benchmark, by its name")
    generation: dict[str, Any] = key(
        {}, "the engine that samples responses: a class of sage.generation by _target_"
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    samples: int = key(1, "responses per problem; accuracy is their mean", low=1)
    limit: int | None = key(None, "use only the first N problems of each benchmark", low=1)
    chat_template: bool = key(True, "wrap prompts in the tokenizer's chat template")

    def check(self) -> None:
        check_target("generation", self.generation)
        if not self.benchmark:
            raise UserError("no benchmark: choose benchmark=NAME, or several with benchmark=[NAME,NAME]")
        check_benchmarks(self.benchmark)
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"samples={self.samples} greedy responses are all the same: set sampling.temperature=0.6"
            )


def check_benchmarks(benchmarks: dict[str, ProblemsConfig]) -> None:
    for name, problems in benchmarks.items():
        check_prompt(f"benchmark.{name}", problems)


def check_prompt(name: str, problems: ProblemsConfig) -> None:
    if "{problem}" not in problems.prompt:
        raise UserError(f"{name}.prompt must hold {{problem}}, the place of the problem's text")


# Command word -> its schema. The command composes conf/WORD.yaml, which names WORD_schema (a dash becomes _).
SCHEMAS: dict[str, type[RunConfig]] = {
    "train": TrainConfig,
    "build-pairs": BuildPairsConfig,
    "score-dataset": ScoreConfig,
    "eval": EvalConfig,
}
for _word, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_word.replace('-', '_')}_schema", node=_schema)


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield (dotted key, its field, its value) for every leaf of a config dataclass."""
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f, value


def load(source: DictConfig | str | Path) -> RunConfig:
    """Read a composed config, or a run directory's frozen one, into its command's dataclass and check it.

    Raises:
        UserError: a key is unknown, missing, of the wrong type, out of range, or at odds with another.
    """
    if not isinstance(source, DictConfig):
        source = read_frozen(Path(source))
    try:
        cfg: RunConfig = OmegaConf.to_object(source)  # pyright: ignore
    except OmegaConfBaseException as e:
        raise UserError(str(e).splitlines()[0] + (f" (key {e.full_key})" if e.full_key else "")) from e
    check(cfg)
    return cfg


def read_frozen(run_dir: Path) -> DictConfig:
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    try:
        written: Any = OmegaConf.load(file)
        return OmegaConf.merge(OmegaConf.structured(SCHEMAS[written["command"]]), written)  # pyright: ignore
    except (KeyError, TypeError, OmegaConfBaseException, yaml.YAMLError) as e:
        raise UserError(f"{file} is not a config that sage wrote: {str(e).splitlines()[0]}") from e


def check(cfg: RunConfig) -> None:
    """Raise UserError for values out of range and for combinations that cannot run."""
    for name, f, value in walk(cfg):
        m = f.metadata
        if m.get("choices") and value not in m["choices"]:
            raise UserError(f"{name}={value}: must be one of {', '.join(map(str, m['choices']))}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if m.get("low") is not None and value < m["low"]:
                raise UserError(f"{name}={value}: must be at least {m['low']}")
            if m.get("high") is not None and value > m["high"]:
                raise UserError(f"{name}={value}: must be at most {m['high']}")
    cfg.check()


def check_target(group: str, node: dict[str, Any]) -> None:
    """Check a `_target_` group against the dataclass it names, so that typos fail before a model is loaded."""
    if "_target_" not in node:
        raise UserError(f"{group}: choose one with {group}=NAME, or give {group}._target_")
    try:
        cls = get_class(node["_target_"])
    except Exception as e:
        raise UserError(f"{group}._target_={node['_target_']} cannot be imported: {e}") from e
    if not dataclasses.is_dataclass(cls):
        return
    given = {k: v for k, v in node.items() if not k.startswith("_")}
    try:
        schema = OmegaConf.structured(cls)
        OmegaConf.merge(schema, given)
    except OmegaConfBaseException as e:
        raise UserError(f"{group}: {str(e).splitlines()[0]} (key {group}.{e.full_key})") from e


def freeze(cfg: RunConfig, run_dir: Path) -> None:
    """Write the one resolved config that every rank of a run reads.

    Raises:
        UserError: the directory already holds a run.
    """
    file = run_dir / CONFIG_FILE
    if file.exists():
        raise UserError(
            f"{run_dir} already holds a run: go on with `sage resume {run_dir}`, or choose another hydra.run.dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))

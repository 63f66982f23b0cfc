"""The config of each command, and the checks of combinations that no type can express.

The dataclasses are registered with Hydra, so composition itself rejects unknown keys and wrong types. A `check`
raises and never edits: what was composed is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from sage.config.checks import check_benchmarks, check_prompt, check_target
from sage.config.groups import (
    ChatConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    PairingConfig,
    ProblemsConfig,
    SamplingConfig,
    TrackingConfig,
    key,
)
from sage.util.errors import UserError


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
        {}, "the engine that samples responses: a class of sage.answering.generation by _target_"
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    pairing: PairingConfig = field(default_factory=PairingConfig)
    steps: int | None = key(None, "optimizer steps; give this or epochs", low=1)
    epochs: float | None = key(None, "passes over the training pairs; give this or steps", low=0)
    batch_size: int = key(32, "pairs per optimizer step, over all ranks", low=1)
    micro_batch_tokens: int = key(16384, "tokens (padding included) of one forward of one rank", low=2)
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
        if self.tracking.snr_every and self.engine.zero_stage == 3:
            raise UserError(
                f"tracking.snr_every={self.tracking.snr_every} needs whole gradients, which engine.zero_stage=3 never holds: use "
                "engine=zero2, or tracking.snr_every=0"
            )
        if self.tracking.snr_every and self.batch_size == 1:
            raise UserError(
                f"tracking.snr_every={self.tracking.snr_every}: a batch_size of 1 pair shows no noise: raise it, or set tracking.snr_every=0"
            )
        if self.data.scores and self.reference == "online":
            raise UserError("data.scores is a reference cache, so it needs reference=cached")

    def check_forward(self) -> None:
        """What a pass over the pairs needs, with or without training."""
        for group in ("loss", "scorer"):
            check_target(group, getattr(self, group))
        if self.data.path is None and self.data.problems.path is None:
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
        if self.data.problems.path is None:
            raise UserError(
                "data.problems is not set: choose data=gsm8k, or give problems of your own with data.problems.path=FILE"
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
        None,
        "write this share of the rows, those with the highest scores, to RUN_DIR/top as the input has them",
        low=0,
        high=1,
    )
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
        {}, "the engine that samples responses: a class of sage.answering.generation by _target_"
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    samples: int = key(1, "responses per problem; accuracy is their mean", low=1)
    benchmark_limit: int | None = key(None, "use only the first N problems of each benchmark", low=1)
    data: ChatConfig = field(default_factory=ChatConfig)

    def check(self) -> None:
        check_target("generation", self.generation)
        if not self.benchmark:
            raise UserError("no benchmark: choose benchmark=NAME, or several with benchmark=[NAME,NAME]")
        check_benchmarks(self.benchmark)
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"samples={self.samples} greedy responses are all the same: set sampling.temperature=0.6"
            )


# Command word -> its schema. The command composes conf/WORD.yaml, which names WORD_schema (a dash becomes _).
SCHEMAS: dict[str, type[RunConfig]] = {
    "train": TrainConfig,
    "build-pairs": BuildPairsConfig,
    "score-dataset": ScoreConfig,
    "eval": EvalConfig,
}


for _word, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_word.replace('-', '_')}_schema", node=_schema)

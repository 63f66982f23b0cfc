"""The config of each command, and the checks of combinations that no type can express.

A `check` raises and never edits: the composed config is the one that runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sage.config.checks import check_benchmarks, check_building, check_patience, check_sources, check_target
from sage.config.command import CommandConfig, RunConfig
from sage.config.data import ChatConfig, DataConfig, ProblemsConfig, ResponseColumns
from sage.config.groups import EngineConfig, OptimizerConfig, PairingConfig, TrackingConfig, key
from sage.config.keys import because
from sage.util.errors import UserError

# Keys of the model group that only passes over pairs use.
GENERATION_IGNORES: dict[str, str] = because(
    "which only samples responses",
    "model.head",
    "model.gradient_checkpointing",
    "model.router_aux_coef",
    "model.tiled_mlp",
)


def ignored_adapter(cfg: RunConfig) -> dict[str, str]:
    """A new adapter changes no answer, so it has no effect where nothing is trained."""
    if cfg.model.adapter_path is not None:
        return {}
    return because("since a new adapter changes no answer: give model.adapter_path", "model.lora")


@dataclass
class TrainConfig(RunConfig):
    command: str = key("train", "the command that this config is for", choices=("train",))
    name: str = key("train", "names the run's folder")
    data: DataConfig = field(default_factory=DataConfig)
    loss: dict[str, Any] = key({}, "the objective: a class of sage.losses, or yours, by _target_")
    scorer: dict[str, Any] = key(
        {}, "which candidates get a gradient: a class of sage.scorers, or another, by _target_"
    )
    curriculum: dict[str, Any] = key(
        {}, "which pairs are candidates: a class of sage.curriculum, or another, by _target_"
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    pairing: PairingConfig = field(default_factory=PairingConfig)
    steps: int | None = key(None, "optimizer steps; give this or epochs", low=1)
    epochs: float | None = key(None, "passes over the training pairs; give this or steps", above=0)
    batch_size: int = key(32, "pairs per optimizer step, over all ranks", low=1)
    micro_batch_tokens: int | str = key(
        16384,
        "tokens, with padding, in one forward pass of one rank; auto = the most that fit, by the estimate of "
        "`sage plan`",
        low=2,
    )
    reference: str = key(
        "cached",
        "reference log-probabilities: cached = computed once and kept on disk; online = computed in "
        "every step by a second model",
        choices=("cached", "online"),
    )
    reference_model: str | None = key(
        None, "the reference, in any form of model.path; null = the policy itself, as before training"
    )
    eval_every: int = key(0, "steps between evaluations; 0 = only before and after training", low=0)
    benchmark: dict[str, ProblemsConfig] = key(
        {}, "problems that an evaluation also answers, greedily, to report accuracy: +benchmark=NAME"
    )
    benchmark_limit: int | None = key(
        64, "use only the first N problems of each benchmark; null = all", low=1
    )
    select: str | None = key(
        None, "metric of the evaluations by which the best policy is kept in best/; -METRIC = less is better"
    )
    patience: int | None = key(
        None, "end the run after this many evaluations without a better `select`; null = never", low=1
    )
    export_float32: bool = key(
        False, "also write the float32 weights behind final/ (best/ with select), to go on without rounding"
    )
    export_optimizer: bool = key(
        False, "also write the optimizer's state beside them, for optimizer.continue_from of another run"
    )
    save_minutes: float = key(15.0, "minutes between checkpoints; a signal also saves one", above=0)
    save_every: int = key(0, "steps between further checkpoints; 0 = none", low=0)
    keep_checkpoints: int = key(2, "number of newest checkpoints to keep", low=1)
    log_every: int = key(1, "steps between log lines", low=1)

    hooks: dict[str, dict[str, Any]] = key(
        {}, "extra metrics: a name for each, and your subclass of sage.training.hooks.Hook by _target_"
    )

    def check(self) -> None:
        self.check_forward()
        check_target("curriculum", self.curriculum)
        generates = bool(self.benchmark) or not self.data.has_pairs
        check_target("generation", self.generation, used=generates)
        for name, node in self.hooks.items():
            check_target(f"hooks.{name}", node, "hooks")
        check_benchmarks(self.benchmark)
        check_patience(self.patience, self.select, self.eval_every)
        if not self.data.has_pairs:
            check_building(self)
        if self.steps is None and self.epochs is None:
            raise UserError("the length of the run is not set: give steps=N or epochs=X")
        if self.steps is not None and self.epochs is not None:
            raise UserError(
                f"steps={self.steps} and epochs={self.epochs:g} are both set: add epochs=null, or steps=null"
            )
        together = self.engine.sequence_parallel
        if self.batch_size < (groups := self.world_size // together):
            raise UserError(
                f"batch_size={self.batch_size} pairs cannot feed world_size={self.world_size} ranks"
                + (f", of which every {together} compute a pair together" if together > 1 else "")
                + f": set batch_size={groups} or more"
            )
        if self.engine.offload and self.engine.zero_stage == 0:
            raise UserError("engine.offload=true needs engine.zero_stage=1, 2 or 3")
        if self.tracking.snr_every and self.engine.zero_stage == 3:
            raise UserError(
                f"tracking.snr_every={self.tracking.snr_every} needs whole gradients, which "
                "engine.zero_stage=3 never holds: use engine=zero2, or tracking.snr_every=0"
            )
        if self.tracking.snr_every and self.batch_size == 1:
            raise UserError(
                f"tracking.snr_every={self.tracking.snr_every}: a batch of one pair has no noise to "
                "measure: raise batch_size, or set tracking.snr_every=0"
            )
        if self.tracking.snr_every and together > 1:
            raise UserError(
                f"tracking.snr_every={self.tracking.snr_every} needs whole gradients of pairs, and with "
                f"engine.sequence_parallel={together} each rank has a part: set tracking.snr_every=0"
            )
        if self.data.scores and self.reference == "online":
            raise UserError("data.scores is a cache of the reference, so it needs reference=cached")

    def check_forward(self) -> None:
        """Check what a forward pass over the pairs needs, with or without training."""
        super().check()
        for group in ("loss", "scorer"):
            check_target(group, getattr(self, group))
        check_sources(self.data)
        if not self.data.has_pairs and self.data.problems.path is None:
            raise UserError(
                f"data.path is not set: give experiment {self.name!r} its preference pairs with "
                "data.path=FILE (JSONL, Parquet, an Arrow folder or a hub name with prompt, chosen and "
                "rejected), several files with data.sources, or problems to build them from with "
                "data.problems.path=FILE"
            )
        together = self.engine.sequence_parallel
        if self.world_size % together:
            raise UserError(
                f"engine.sequence_parallel={together} does not divide world_size={self.world_size}, and each "
                f"group of {together} ranks computes rows together: set world_size={together} or a multiple"
            )
        if together > 1 and self.data.packing == "padded":
            raise UserError(
                f"engine.sequence_parallel={together} needs packed rows, and data.packing=padded makes none: "
                "set data.packing=auto"
            )
        if isinstance(self.micro_batch_tokens, str):
            if self.micro_batch_tokens != "auto":
                raise UserError(f"micro_batch_tokens={self.micro_batch_tokens}: must be a number or auto")
        elif self.micro_batch_tokens < (needed := self.tokens_of_longest()):
            raise UserError(
                f"micro_batch_tokens={self.micro_batch_tokens} cannot hold one pair of data.max_length="
                f"{self.data.max_length} (two rows): set micro_batch_tokens={needed}, or lower "
                "data.max_length, or raise engine.sequence_parallel"
            )

    def tokens_of_longest(self) -> int:
        """What one rank computes of a pair of data.max_length: two rows, or its part of them."""
        return -(-2 * self.data.max_length // self.engine.sequence_parallel)

    def ignored(self) -> dict[str, str]:
        ignored = {**super().ignored(), **self.data.ignored()}
        if not (self.data.has_held_out or self.benchmark or self.hooks):
            ignored |= because("since there are no held-out pairs, benchmarks or hooks", "eval_every")
        if not self.benchmark:
            ignored |= because("since there is no benchmark", "benchmark_limit")
        if self.optimizer.schedule == "constant":
            ignored |= because("since optimizer.schedule=constant", "optimizer.min_lr_ratio")
        if not self.tracking.wandb:
            ignored |= because("since tracking.wandb=false", "tracking.mode", "tracking.project")
        if not self.data.has_pairs:
            return ignored
        given = f"since data.{'sources' if self.data.sources else 'path'} gives the pairs"
        ignored |= because(given, "pairing", "data.problems", "data.build")
        if not self.benchmark:
            reason = f"{given}, and there is no benchmark"
            ignored |= because(reason, "generation", "sampling")
        greedy = "since benchmarks are answered greedily in training"
        return ignored | because(greedy, "sampling.temperature", "sampling.top_p")


@dataclass
class BuildPairsConfig(TrainConfig):
    """`sage build-pairs` runs the first half of an experiment. It has all keys of `sage train`, so that an
    experiment means the same pairs in both."""

    command: str = key("build-pairs", "the command that this config is for", choices=("build-pairs",))

    def check(self) -> None:
        RunConfig.check(self)
        check_target("generation", self.generation)
        check_building(self)

    def ignored(self) -> dict[str, str]:
        used = (*(f.name for f in fields(RunConfig)), "data", "pairing")
        data = ["problems", *(f.name for f in fields(ChatConfig))]
        return {
            **RunConfig.ignored(self),
            **because("which trains nothing", *(f.name for f in fields(self) if f.name not in used)),
            **because(
                "which reads problems", *(f"data.{f.name}" for f in fields(self.data) if f.name not in data)
            ),
            **GENERATION_IGNORES,
            **ignored_adapter(self),
        }


@dataclass
class InspectConfig(TrainConfig):
    """`sage inspect` takes all keys of `sage train`, so that an experiment means the same pairs in both."""

    command: str = key("inspect", "the command that this config is for", choices=("inspect",))
    name: str = key("inspect", "unused: no folder is made")
    show: int = key(3, "print this many pairs", low=0)
    json: str | None = key(None, "write every pair and every dropped row to this file, as JSON lines")

    def check(self) -> None:
        check_sources(self.data)
        if not self.data.has_pairs:
            raise UserError(
                "data.path is not set: inspect shows finished pairs. Give data.path=FILE; `sage "
                "build-pairs` makes one"
            )


@dataclass
class PlanConfig(TrainConfig):
    """`sage plan` takes all keys of `sage train`, so that an experiment means the same run in both."""

    command: str = key("plan", "the command that this config is for", choices=("plan",))
    name: str = key("plan", "names the plan in its title: no folder is made")
    gpu_gb: float | None = key(
        None, "plan for GPUs of this many GB (10^9 bytes) each, instead of this machine", above=0
    )
    json: str | None = key(None, "also write the plan to this file")


@dataclass
class EvalConfig(RunConfig):
    command: str = key("eval", "the command that this config is for", choices=("eval",))
    name: str = key("eval", "names the run's folder")
    data: ChatConfig = field(default_factory=ChatConfig)
    benchmark: dict[str, ProblemsConfig] = key({}, "the problems of each benchmark, by its name")
    samples: int = key(1, "responses per problem; accuracy is their mean", low=1)
    benchmark_limit: int | None = key(
        None, "use only the first N problems of each benchmark; null = all", low=1
    )

    def check(self) -> None:
        super().check()
        check_target("generation", self.generation)
        if not self.benchmark:
            raise UserError(
                "no benchmark is chosen: give benchmark=NAME, or several with benchmark=[NAME,NAME]"
            )
        check_benchmarks(self.benchmark)
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"samples={self.samples} greedy responses are all the same: set sampling.temperature=0.6"
            )

    def ignored(self) -> dict[str, str]:
        return {**super().ignored(), **GENERATION_IGNORES, **ignored_adapter(self)}


@dataclass
class VerifyConfig(CommandConfig):
    command: str = key("verify", "the command that this config is for", choices=("verify",))
    name: str = key("verify", "names the run's folder")
    path: str | None = key(
        None,
        "responses and their true answers, in any form that data.path takes; or the folder of a "
        "finished eval",
    )
    split: str = key("test", "split of a hub dataset or an Arrow DatasetDict")
    columns: ResponseColumns = field(default_factory=ResponseColumns)
    answer_from: str = key(
        "plain",
        "how the true answer is written in its column: after ####, in the last \\boxed{}, or alone",
        choices=("hash", "boxed", "plain"),
    )
    output: str | None = key(None, "file to write; null = RUN_DIR/verdicts.jsonl")
    limit: int | None = key(None, "use only the first N rows", low=1)
    workers: int | None = key(None, "processes that compare formulas; null = one per CPU core", low=1)
    timeout: float = key(5.0, "seconds of CPU time that one answer may take", low=0.1)

    def check(self) -> None:
        if self.path is None:
            raise UserError("no file: `sage verify FILE` takes responses with their true answers")

    def ignored(self) -> dict[str, str]:
        one_file = self.path is not None and Path(self.path).expanduser().is_file()
        return because("since path is one file", "split") if one_file else {}


@dataclass
class DoctorConfig(CommandConfig):
    command: str = key("doctor", "the command that this config is for", choices=("doctor",))
    name: str = key("doctor", "unused: no folder is made")
    cache_dir: str = key("~/.cache/sage", "the cache_dir of your runs, whose disk is looked at")
    json: str | None = key(None, "also write the table to this file")

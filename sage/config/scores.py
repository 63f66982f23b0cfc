"""The config of `sage score-dataset`: all keys of `sage train`, and those of the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sage.config.checks import check_target
from sage.config.groups import key
from sage.config.keys import because
from sage.config.schema import TrainConfig
from sage.util.errors import UserError

# Options of a scorer that say how a run chooses by its scores.
CHOOSING = ("candidates_per_pair", "score_every", "reuse", "warmup_steps", "temperature", "max_nan")
GATES = ("mastered_above", "drop_curvature", "drop_uncertainty", "drop_negative")


@dataclass
class ScoreConfig(TrainConfig):
    """`sage score-dataset` has all keys of `sage train`, so that an experiment means the same in both."""

    command: str = key("score-dataset", "the command that this config is for", choices=("score-dataset",))
    name: str = key("scores", "names the run's folder")
    scorers: dict[str, dict[str, Any]] = key(
        {},
        "further scores: a name for each, and a class of sage.scorers, or yours, by _target_; "
        "+scorer@scorers.NAME=OPTION adds one",
    )
    top: float | None = key(
        None,
        "write this share of the rows, those with the highest scores, to RUN_DIR/top, unchanged",
        above=0,
        high=1,
    )
    show: int = key(0, "print this many of the highest and of the lowest pairs", low=0)
    strata: int = key(4, "the summary groups pairs into this many quantiles of difficulty", low=1)
    shard_pairs: int = key(
        1024, "pairs per Parquet file; a killed run computes at most this many again", low=1
    )

    def check(self) -> None:
        self.check_forward()
        for name, node in self.scorers.items():
            check_target(f"scorers.{name}", node, "scorer")
        if self.data.scores:
            raise UserError("data.scores is what score-dataset writes: leave it out")

    def ignored(self) -> dict[str, str]:
        training = (
            "curriculum optimizer tracking steps epochs batch_size reference eval_every benchmark "
            "benchmark_limit select patience export_float32 export_optimizer save_minutes save_every "
            "keep_checkpoints log_every hooks loss.nll_weight model.gradient_checkpointing "
            "model.router_aux_coef engine.offload data.eval_split data.eval_limit"
        )
        if self.data.eval_path is not None:  # null makes way for data.eval_share, which leaves pairs out
            training += " data.eval_path"
        scorers = ["scorer", *(f"scorers.{name}" for name in self.scorers)]
        choosing = [f"{scorer}.{option}" for scorer in scorers for option in CHOOSING]
        gated = scorers if self.top is None else scorers[1:]
        gates = [f"{scorer}.{gate}" for scorer in gated for gate in GATES]
        return {
            **super().ignored(),
            **because("which trains nothing", *training.split(), *choosing),
            **because("whose gates only decide which rows top=SHARE writes, by scorer", *gates),
        }

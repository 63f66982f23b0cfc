"""The config of `sage rounds`: all keys of `sage train`, and those of the rounds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sage.config.checks import check_building, check_target
from sage.config.data import DataConfig, PairColumns, ProblemsConfig
from sage.config.groups import key
from sage.config.keys import because
from sage.config.schema import TrainConfig
from sage.util.errors import UserError


@dataclass
class RoundConfig:
    budget: int | None = key(None, "responses to sample in one round, at most; null = no limit", low=1)
    floor: float = key(
        0.1,
        "share of the problems with all answers right or all wrong, as last seen, that a round asks again; "
        "it asks all other problems, if the budget allows",
        above=0,
        high=1,
    )
    max_samples: int = key(
        32,
        "a problem without a right answer gets twice as many responses when it is asked again, up to this",
        low=1,
    )
    reference: str = key(
        "previous",
        "the reference of a round's training: previous = the policy that the round starts from; initial = "
        "the first policy",
        choices=("previous", "initial"),
    )
    optimizer: str = key(
        "fresh",
        "the optimizer of a round's training: fresh = without state; continued = goes on with that of the "
        "round before",
        choices=("fresh", "continued"),
    )
    keep: float = key(
        0.0,
        "train also on this share, at most, of the pairs of the round before: those that the policy still "
        "gets wrong, and whose problem was not asked again",
        low=0,
        high=1,
    )
    temperatures: list[float] = key(
        [],
        "sampling temperature of round 1, 2 and so on; the last one is that of all later rounds; empty = "
        "sampling.temperature",
        above=0,
    )
    rejected: str = key(
        "own",
        "where rejected responses come from: own = the policy that is trained; earlier = the weakest policy "
        "of the earlier rounds that gave a wrong answer to the problem, else the policy itself",
        choices=("own", "earlier"),
    )


@dataclass
class RoundsConfig(TrainConfig):
    """`sage rounds` has all keys of `sage train`, so that an experiment means the same in both."""

    command: str = key("rounds", "the command that this config is for", choices=("rounds",))
    name: str = key("rounds", "names the run's folder")
    rounds: int = key(3, "rounds of sampling, training and evaluation", low=1)
    round: RoundConfig = field(default_factory=RoundConfig)
    benchmark_limit: int | None = key(
        None, "use only the first N problems of each benchmark; null = all", low=1
    )

    def check(self) -> None:
        temperature = min(self.round.temperatures, default=self.sampling.temperature)
        # Patience counts rounds here, not evaluations.
        checked = replace(self, patience=None, sampling=replace(self.sampling, temperature=temperature))
        check_building(checked)
        TrainConfig.check(checked)
        check_target("generation", self.generation)
        metrics = [f"benchmark/{name}/accuracy" for name in self.benchmark]
        if self.select is not None and self.select not in metrics:
            raise UserError(
                f"select={self.select}: rounds are compared by their accuracy on problems, so it can be "
                f"{', '.join(metrics) or 'benchmark/NAME/accuracy, with +benchmark=NAME'}"
            )
        if self.patience is not None and self.select is None:
            raise UserError(
                f"patience={self.patience} needs a metric to watch: give select=benchmark/NAME/accuracy"
            )
        if self.round.budget is not None and self.round.budget < self.pairing.samples:
            raise UserError(
                f"round.budget={self.round.budget} is too small for one problem: raise it to "
                f"pairing.samples={self.pairing.samples} or more"
            )
        self.check_reference()
        if not self.start:
            raise UserError(
                "start=false has no effect: `sage rounds` starts the ranks of its parts itself. Leave it out"
            )

    def check_reference(self) -> None:
        """Check that the first policy can be the reference of later rounds."""
        if self.round.reference == "previous":
            return
        alone = {
            "reference_model": "is a reference already: leave one of them out",
            "model.adapter_path": "is no whole model: merge the adapter first",
            "model.trust_remote_code": "would let a reference run code: use round.reference=previous",
            "model.allow_missing": "leaves weights to chance: use round.reference=previous",
        }
        for name, reason in alone.items():
            value = self.reference_model if name == "reference_model" else getattr(self.model, name[6:])
            if value:
                raise UserError(f"round.reference=initial: {name}={value} {reason}")

    def pairs_of_a_round(self, path: str | None) -> DataConfig:
        """The data of a round's training: the pairs that were built in `path`, and the held-out pairs."""
        return replace(
            self.data,
            path=path,
            sources={},
            split="train",
            limit=None,
            columns=PairColumns(),
            problems=ProblemsConfig(),
            scores=None,
            answers=None,
        )

    def ignored(self) -> dict[str, str]:
        keys = ("path", "sources", "split", "limit", "columns", "scores", "build", "answers")
        reason = "which builds the pairs of each round from data.problems"
        training = replace(self, data=self.pairs_of_a_round(None))
        ignored = {**TrainConfig.ignored(training), **because(reason, *(f"data.{name}" for name in keys))}
        if not (self.data.has_held_out or self.select or self.hooks):
            reason = "since the training of a round has no held-out pairs, no hooks and no select"
            ignored |= because(reason, "eval_every")
        if self.round.temperatures:
            ignored |= because("since round.temperatures has that of each round", "sampling.temperature")
        return ignored

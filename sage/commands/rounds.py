"""Train in rounds: ask the policy problems, train it on pairs of its answers, and ask the new policy again.

Each part of a round is the run folder of another command. A part is finished when its last file is there, and
all that a part needs is in the config and in the parts before it. So a killed `sage rounds` goes on exactly.

RUN_DIR/round_0/eval            `sage eval` of the first policy; only with benchmarks, as all eval folders
RUN_DIR/round_N/policy.sha256   names the policy that round N began with; not in the first
RUN_DIR/round_N/problems.jsonl  the problems of round N, and how many responses each gets
RUN_DIR/round_N/pairs           `sage build-pairs`
RUN_DIR/round_N/outcomes.jsonl  how many responses to each problem were right
RUN_DIR/round_N/older           `sage score-dataset` of the pairs of the round before; only with round.keep
RUN_DIR/round_N/pool.jsonl      the new pairs and those of the older ones that stay; only with round.keep
RUN_DIR/round_N/train           `sage train`
RUN_DIR/round_N/eval            `sage eval`
RUN_DIR/times.jsonl             seconds of each part; a part that was interrupted has several lines
RUN_DIR/final                   the policy of the best round, or of the last one without `select`
RUN_DIR/summary.json            what each round did and cost; written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from filelock import Timeout

from sage import config
from sage.answering.asking import Outcome, choose
from sage.answering.attempts import GENERATIONS_FILE
from sage.answering.problems import Problem, read_problems
from sage.commands.build_pairs import MANIFEST_FILE, intact
from sage.commands.rounds_inputs import claim_inputs, warn_of_known_problems
from sage.commands.rounds_parts import PROBLEMS_FILE, Parts
from sage.commands.rounds_pool import training_pairs
from sage.commands.rounds_results import (
    OUTCOMES_FILE,
    attempts_in,
    check_attempts,
    check_export,
    check_start,
    read_json,
    read_outcomes,
    results,
    table,
    write_outcomes,
)
from sage.config import (
    SUMMARY_FILE,
    BuildPairsConfig,
    ChatConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RoundsConfig,
    TrainConfig,
)
from sage.model import loading
from sage.model.export import ADAPTER
from sage.model.masters import MASTERS_FOLDER, trained_folder
from sage.training.best import Criterion
from sage.training.checkpoint import BEST_FOLDER
from sage.training.optimizer_state import OPTIMIZER_FOLDER
from sage.training.setup import check_reference
from sage.util import checksums, stopping
from sage.util.errors import UserError, disk_full
from sage.util.files import delete_folder, link_folder, write_json, write_text
from sage.util.locks import RANK_LOCK, lock
from sage.util.progress import console

SEEDS = 1000  # a round's seed is the config's seed times this, plus the round's number


class Finished(Exception):
    """There is nothing left to train on. The message says why."""


def rounds(run_dir: Path, start: Callable[[int, Path], None]) -> None:
    """Do the rounds of the frozen config in `run_dir`, or go on with them.

    Args:
        start: runs the command whose frozen config is in a folder, in a number of ranks, and waits for it.

    Raises:
        UserError: a round gives nothing to train on, or the disk is full.
        SystemExit: a part has failed, and has said why; or a signal ended it.
    """
    cfg = config.load(run_dir)
    assert isinstance(cfg, RoundsConfig)
    try:
        held = lock(run_dir / RANK_LOCK.format(0), timeout=0)
    except Timeout as e:
        raise UserError(f"{run_dir}: these rounds are still running: wait for them, or kill them") from e
    try:
        Loop(cfg, run_dir, Parts(cfg, run_dir, start)).run()
    except OSError as e:
        if not disk_full(e):
            raise
        raise UserError(f"the disk of {run_dir} is full: make room, then {stopping.go_on(run_dir)}") from e
    finally:
        held.release()


@dataclass
class Loop:
    """The rounds of one config; they are numbered from 1."""

    cfg: RoundsConfig
    run_dir: Path
    parts: Parts

    def folder(self, number: int) -> Path:
        return self.parts.folder(number)

    @cached_property
    def problems(self) -> list[Problem]:
        return read_problems(self.cfg.data.problems)

    def run(self) -> None:
        check_reference(self.cfg, *(config.build(key, getattr(self.cfg, key)) for key in ("loss", "scorer")))
        claim_inputs(self.cfg, self.run_dir)
        warn_of_known_problems(self.cfg)
        policies, values, ended = [self.cfg.model], list[float](), None
        criterion = Criterion.of(self.cfg.select) if self.cfg.select else None
        best, stale = 0, 0  # the round of the best policy, and the rounds since then
        self.evaluate(0, policies[0])
        for number in range(1, self.cfg.rounds + 1):
            try:
                policies.append(self.round(number, policies[-1]))
            except Finished as e:
                ended = str(e)
                break
            if criterion is None:
                best = number
                continue
            trained = read_json(self.folder(number) / "train" / SUMMARY_FILE)
            value = trained["best"]["value"]
            values = values or [trained["before"][criterion.metric]]  # of the first policy
            better = criterion.improves(value, max(values))
            values.append(value)
            best, stale = (number, 0) if better else (best, stale + 1)
            if self.cfg.patience is not None and stale >= self.cfg.patience:
                ended = f"no better {self.cfg.select} in {stale} rounds"
                break
        done = len(policies) - 1
        if ended:
            console.print(f"stopped after round {done} of {self.cfg.rounds}: {ended}", markup=False)
        if done:  # if no round was better, the best policy of the first is the one that it started from
            link_folder(Path(policies[max(best, 1)].path), self.run_dir / "final", self.passing)
        self.finish(done, best, max(values, default=None), ended)

    def round(self, number: int, policy: ModelConfig) -> ModelConfig:
        """Do one round with the policy of the round before. Returns the new policy."""
        folder = self.folder(number)
        console.print(f"round {number} of {self.cfg.rounds}", markup=False)
        begins = self.goes_on_from(policy)
        weights = trained_folder(begins, begins.path)
        if policy is not self.cfg.model:
            needed = OPTIMIZER_FOLDER if self.continued else MASTERS_FOLDER
            check_start(Path(policy.path), weights / needed, folder)
        self.ask(number)
        self.build(number, policy)
        pairs = training_pairs(self.parts, number, policy)
        self.check_pairs(number, pairs)
        train = self.parts.command(
            TrainConfig,
            "train",
            model=begins,
            reference_model=self.reference(number),
            seed=self.seed(number),
            data=self.cfg.pairs_of_a_round(str(pairs)),
            benchmark={
                n: b for n, b in self.cfg.benchmark.items() if self.cfg.select == f"benchmark/{n}/accuracy"
            },
            patience=None,
            optimizer=self.optimizer(policy, weights),
            # A round must not lose what it has learned. The optimizer's state holds that, too.
            export_float32=self.cfg.export_float32 or not self.continued,
            export_optimizer=self.cfg.export_optimizer or self.continued,
        )
        self.parts.do(train, folder / "train", folder / "train" / SUMMARY_FILE)
        shutil.rmtree(folder / "train" / "checkpoints", ignore_errors=True)  # a finished part needs none
        trained = folder / "train" / (BEST_FOLDER if self.cfg.select else "final")
        check_export(trained)
        if policy is not self.cfg.model:
            for name in self.passing:
                delete_folder(weights / name)
        policy = replace(self.cfg.model, path=str(trained), revision=None, adapter_path=None)
        self.evaluate(number, policy)
        return policy

    @property
    def continued(self) -> bool:
        """Whether the optimizer of a round goes on with the state of the round before."""
        return self.cfg.round.optimizer == "continued"

    @property
    def passing(self) -> list[str]:
        """Folders beside a policy that only the next round needs."""
        asked = {MASTERS_FOLDER: self.cfg.export_float32, OPTIMIZER_FOLDER: self.cfg.export_optimizer}
        return [name for name, kept in asked.items() if not kept]

    def optimizer(self, policy: ModelConfig, weights: Path) -> OptimizerConfig:
        """That of a round. `weights`: the folder of the policy, or the adapter, that it goes on training."""
        if policy is self.cfg.model:
            return self.cfg.optimizer
        state = str(weights / OPTIMIZER_FOLDER) if self.continued else None
        return replace(self.cfg.optimizer, continue_from=state)

    def goes_on_from(self, policy: ModelConfig) -> ModelConfig:
        """What a round trains: the policy of the round before. Its adapter is not merged, since merging would
        round what it has learned."""
        if policy is self.cfg.model or self.cfg.model.lora is None:
            return policy
        return replace(self.cfg.model, adapter_path=str(Path(policy.path) / ADAPTER))

    def seed(self, number: int) -> int:
        return self.cfg.seed * SEEDS + number

    def reference(self, number: int) -> str | None:
        """The reference of a round, or None for the policy that it starts from."""
        if self.cfg.round.reference == "previous" or number == 1:
            return self.cfg.reference_model
        first = self.cfg.model
        return first.path if first.revision is None else loading.resolve_model(first, self.cfg.cache_dir)

    def temperature(self, number: int) -> float:
        each = self.cfg.round.temperatures
        return each[min(number, len(each)) - 1] if each else self.cfg.sampling.temperature

    # --- the parts

    def ask(self, number: int) -> None:
        """Choose the problems of a round by the outcomes of all rounds before it.

        Raises:
            Finished: the policy gave right answers only, when each problem was last asked.
        """
        file = self.folder(number) / PROBLEMS_FILE
        if checksums.intact(file):
            return
        seen: dict[str, Outcome] = {}
        for earlier in range(1, number):
            seen |= read_outcomes(self.folder(earlier))
        if all(p.problem_id in seen and seen[p.problem_id].kind == "mastered" for p in self.problems):
            raise Finished(
                "nothing is left to learn: every problem had right answers only when it was last asked"
            )
        counts = choose(
            {p.problem_id: p.samples or self.cfg.pairing.samples for p in self.problems},
            seen,
            max_samples=self.cfg.round.max_samples,
            floor=self.cfg.round.floor,
            budget=self.cfg.round.budget,
            seed=f"{self.cfg.seed}/{number}",
        )
        asked = [replace(p, samples=counts[p.problem_id]) for p in self.problems if p.problem_id in counts]
        write_text(file, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in asked))
        checksums.seal_file(file)
        console.print(f"round {number}: {len(asked)} problems, {sum(counts.values())} responses")

    def build(self, number: int, policy: ModelConfig) -> None:
        """Sample, verify and pair.

        Raises:
            UserError: no answer could be verified.
        """
        folder = self.folder(number)
        pairs, pairing = folder / "pairs", self.cfg.pairing
        if self.cfg.round.rejected == "earlier":
            earlier = [str(self.folder(n) / "pairs") for n in range(1, number)]
            pairing = replace(pairing, rejected_from=[*pairing.rejected_from, *earlier])
        build = self.parts.command(
            BuildPairsConfig,
            "build-pairs",
            model=self.parts.merged(policy),
            seed=self.seed(number),
            data=replace(self.cfg.data, path=None, problems=self.parts.asked(number)),
            sampling=replace(self.cfg.sampling, temperature=self.temperature(number)),
            pairing=pairing,
        )
        if not intact(pairs):
            (pairs / MANIFEST_FILE).unlink(missing_ok=True)
        self.parts.do(build, pairs, pairs / MANIFEST_FILE)
        if not checksums.intact(folder / OUTCOMES_FILE):
            attempts = attempts_in(pairs, read_json(pairs / MANIFEST_FILE)["counts"]["responses"])
            check_attempts(number, attempts, pairs / GENERATIONS_FILE)
            write_outcomes(folder, attempts)

    def check_pairs(self, number: int, pool: Path) -> None:
        """Go on only if there is a pair to train on.

        Raises:
            Finished: no response was wrong, or an earlier round has trained a policy already.
            UserError: no problem had a right and a wrong response.
        """
        if pool.stat().st_size:
            return
        folder = self.folder(number) / "pairs"
        counts = read_json(folder / MANIFEST_FILE)["counts"]
        if counts["right"] == counts["responses"]:
            raise Finished(f"nothing is left to learn: all {counts['responses']} responses were right")
        reason = (
            f"round {number} gave no pair: {counts['right']} of {counts['responses']} responses were "
            "right. In another hydra.run.dir, raise pairing.samples, or set "
            "pairing.chosen=own_then_gold if the problems have solutions; see "
            f"{folder / GENERATIONS_FILE}"
        )
        raise UserError(reason) if number == 1 else Finished(reason)

    def evaluate(self, number: int, policy: ModelConfig) -> None:
        """Answer all benchmarks greedily, as the evaluations of `sage train` do."""
        if not self.cfg.benchmark:
            return
        folder = self.folder(number) / "eval"
        chat = {f.name: getattr(self.cfg.data, f.name) for f in fields(ChatConfig)}
        evaluation = self.parts.command(
            EvalConfig,
            "eval",
            model=self.parts.merged(policy),
            data=ChatConfig(**chat),
            sampling=replace(self.cfg.sampling, temperature=0.0),
            samples=1,
        )
        self.parts.do(evaluation, folder, folder / SUMMARY_FILE)

    # --- the summary

    def finish(self, done: int, best: int, value: float | None, ended: str | None) -> None:
        found = [results(self.run_dir, number, list(self.cfg.benchmark)) for number in range(done + 1)]
        after = {f"benchmark/{n}/accuracy": b["accuracy"] for n, b in found[best]["benchmarks"].items()}
        summary = {
            "name": self.cfg.name,
            "rounds": found,
            "ended": ended,
            "best": self.cfg.select
            and {
                "metric": self.cfg.select,
                "value": after[self.cfg.select] if value is None else value,
                "round": best,
            },
            "after": after,
            "final": str(self.run_dir / "final") if done else self.cfg.model.path,
        }
        write_json(self.run_dir / SUMMARY_FILE, summary)
        console.print(table(found))
        console.print(f"policy: {summary['final']}\n`sage report {self.run_dir}` shows more", markup=False)

"""Build a run from its frozen config, part by part.

The order matters. Data comes first, so that bad input fails before a model is loaded. The reference comes
after the model, while the policy is still the initial one. The checkpoint of an interrupted run comes last.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sage.answering.check import check_answers
from sage.answering.problems import prompts_of, read_problems, warn_of_known
from sage.config import TrainConfig, build, load
from sage.curriculum import Curriculum, Setting
from sage.data.chat import ChatFormat, response_ends
from sage.data.display import shown
from sage.data.overlap import trained_on
from sage.data.pairs import load_data
from sage.data.tokens import TokenizedPairs, tokenize_data
from sage.losses import Loss
from sage.model.engine import Engine, init_distributed
from sage.model.forward import PairForward
from sage.model.masters import read_masters
from sage.model.reference import Absent, Scored
from sage.model.selfcheck import settle
from sage.scorers import Scorer, Uniform
from sage.training import checkpoint
from sage.training.base import BaseModel, check_policy, open_model, open_reference
from sage.training.best import Criterion
from sage.training.checkpoint import TrainState, list_checkpoints
from sage.training.estimate import settle_budget, this_machine
from sage.training.evaluation import Benchmarks, HeldOut, check_select
from sage.training.hooks import Hook
from sage.training.optimizer_state import check_optimizer, read_optimizer
from sage.training.pair_log import PairLog
from sage.training.references import other_references, own_references
from sage.training.run import Run
from sage.training.selection import Selection
from sage.training.snr import SNR
from sage.training.sources import Sources, by_source, doubtful
from sage.training.tracking import METRICS_FILE, Tracker
from sage.util import ranks
from sage.util.checksums import digest
from sage.util.errors import UserError
from sage.util.progress import activity, console

FIRST_PAIR_WIDTH = 240  # characters shown of each part of the first pair


def build_run(run_dir: Path) -> Run:
    """The run in `run_dir`, where it begins or where its last checkpoint stopped. Every rank calls this."""
    cfg = load(run_dir)
    assert isinstance(cfg, TrainConfig)
    loss: Loss = build("loss", cfg.loss)
    scorer: Scorer = build("scorer", cfg.scorer)
    hooks = [build(f"hooks.{name}", node, "hooks") for name, node in cfg.hooks.items()]
    check_reference(cfg, loss, scorer)
    if warning := check_select(cfg, map(type, hooks)):
        console.print(warning, markup=False)
    device = init_distributed()
    torch.manual_seed(cfg.seed)
    if not ranks.main_only(lambda: list_checkpoints(run_dir)):
        check_optimizer(cfg.optimizer)

    with activity(f"finding {cfg.model.path}"):
        base = open_model(cfg.model, device, cfg.seed, cfg.cache_dir)
        other = open_reference(cfg, base, device)
    data = read_data(cfg, base.tokenizer, run_dir)
    scorer, curriculum = build_curriculum(cfg, scorer, data)
    with activity("hashing the model's files"):
        identities = [model.identity() for model in (base, other) if model]  # the last is the reference's
    scored = None
    if cfg.data.scores:
        scored = Scored(cfg.data.scores, data.pairs, identities[-1], of_policy=other is None)

    engine, forward = build_engine(cfg, run_dir, base, data, device)
    given = identities[-1], forward, data.sets, scored
    if loss.reference_free:
        references = [Absent(pairs) for pairs in data.sets]
    elif other:
        references = other_references(cfg, other, *given)
    else:
        references = own_references(cfg, base, *given)
    reference, *held_out_reference = references
    forward.reset_costs()  # what a warm cache would have saved is not a cost of training

    rows = data.steps * scorer.draws(cfg.batch_size)[0] // scorer.score_every
    log = PairLog(run_dir, rows, cfg.tracking.sample_rows, ranks.rank() == 0, data.content)
    selection = Selection(
        scorer, curriculum, loss, data.pairs, forward, reference, log, cfg.batch_size, cfg.seed
    )
    fresh = TrainState(
        data.pairs.fingerprint,
        ranks.world_size(),
        ", reference ".join(found["weights"] for found in identities),
        engine.optimizer_class,
        f"{forward.layout} rows and the {engine.policy.backend} head",
        other_inputs(cfg, data, selection),
    )
    state = restore(run_dir, engine, forward, selection, fresh)
    if state is fresh:
        read_masters(engine, cfg.model, base.folder)
        read_optimizer(engine, cfg.optimizer)
    if cfg.select and ranks.rank() == 0:
        checkpoint.restore_best(state, run_dir)
    built_in: list[Hook] = []
    if data.held_out is not None:
        built_in.append(HeldOut(data.held_out, *held_out_reference))
    if cfg.benchmark:
        built_in.append(Benchmarks())
    if cfg.data.sources:
        built_in.append(Sources(data.pairs))
    if cfg.tracking.snr_every:
        built_in.append(SNR(cfg.tracking.snr_every))
    run = Run(
        cfg,
        run_dir,
        base,
        loss,
        data.pairs,
        data.steps,
        engine,
        forward,
        reference,
        selection,
        state,
        [*built_in, *hooks],
        Criterion.of(cfg.select) if cfg.select else None,
        Tracker(cfg, run_dir, state.step, ranks.rank() == 0),
    )
    ranks.barrier()  # DeepSpeed's own groups do not wait for rank 0 as long as ours does
    return run


def other_inputs(cfg: TrainConfig, data: Data, selection: Selection) -> dict[str, str]:
    """Fingerprints of what a run reads besides its training pairs and its model, by the key that names it."""
    found = {"the tokenizer or the chat template": data.pairs.rendering}
    if data.held_out is not None:
        found["data.eval_path"] = data.held_out.fingerprint
    if selection.other_margin is not None:
        found["scorer.margins_from"] = digest(selection.other_margin.tolist())
    for name, benchmark in cfg.benchmark.items():
        problems = ranks.main_only(partial(read_problems, benchmark))[: cfg.benchmark_limit]
        found[f"benchmark.{name}.path"] = digest([asdict(problem) for problem in problems])
    return found


class Data(NamedTuple):
    pairs: TokenizedPairs
    held_out: TokenizedPairs | None
    steps: int  # of the whole run
    content: str  # names what the source of `pairs` holds

    @property
    def sets(self) -> list[TokenizedPairs]:
        return [self.pairs] if self.held_out is None else [self.pairs, self.held_out]


def read_data(cfg: TrainConfig, tokenizer: Any, run_dir: Path) -> Data:
    pairs, content = read_pairs(cfg, tokenizer, run_dir)
    held_out = read_pairs(cfg, tokenizer, run_dir, held_out=True)[0] if cfg.data.has_held_out else None
    if held_out and not console.quiet and (common := held_out.prompts_also_in(pairs)):
        whole = held_out.also_in(pairs)
        console.print(
            f"warning: {common} of {len(held_out)} held-out pairs ({cfg.data.title(held_out=True)}) have the "
            f"prompt of a training pair, and {whole} are training pairs: their loss does not show what the "
            "policy has learned in general",
            markup=False,
        )
    if not console.quiet:
        warn_of_known_problems(cfg, pairs, tokenizer)
    steps = cfg.steps or math.ceil((cfg.epochs or 0) * len(pairs) / cfg.batch_size - 1e-9)
    return Data(pairs, held_out, steps, content)


def warn_of_known_problems(cfg: TrainConfig, pairs: TokenizedPairs, tokenizer: Any) -> None:
    """Say which benchmarks ask problems that the run trains on."""
    for name, benchmark in cfg.benchmark.items():
        problems = read_problems(benchmark)[: cfg.benchmark_limit]
        texts, prompts = [problem.prompt for problem in problems], prompts_of(problems, benchmark.prompt)
        with activity(f"looking for problems of benchmark.{name} in the training prompts"):
            known = sum(trained_on(pairs, texts, prompts, tokenizer, ChatFormat.of(cfg.data)))
        warn_of_known(name, known, len(problems), "training prompts")


def read_pairs(
    cfg: TrainConfig, tokenizer: Any, run_dir: Path, held_out: bool = False
) -> tuple[TokenizedPairs, str]:
    """The config's pairs, or its held-out ones, tokenised, and the content of their source. Says how many
    there are, and what was dropped.
    """
    data = cfg.data
    title = data.title(held_out)
    source = ranks.machine_first(lambda: load_data(data, cfg.cache_dir, held_out))
    notes, content = list(source.notes), source.content
    if data.answers:
        drop = data.answers == "drop"
        with activity("verifying answers"):
            check = ranks.main_only(lambda: check_answers(source.pairs))
        notes.append(check.summary(drop))
        list_rows(run_dir / "answers.jsonl", title, [found._asdict() for found in check.findings], held_out)
        source = source.without({found.pair_id for found in check.findings}) if drop else source
        if not source.count:
            raise UserError(f"{title}: data.answers=drop leaves no pair; data.answers=check lists them")
    pairs = ranks.machine_first(lambda: tokenize_data(source, tokenizer, data, cfg.cache_dir))
    ranks.agreed(lambda: pairs.fingerprint, f"the tokenised pairs of {title}")
    dropped = [row._asdict() for row in source.dropped]
    dropped += [
        {"pair_id": pair_id, "reason": reason, "detail": pairs.details.get(pair_id)}
        for reason, ids in pairs.dropped.items()
        for pair_id in ids
    ]
    counts = dict(Counter(row["reason"] for row in dropped))
    notes.append(f"{len(pairs)} pairs" + (f", dropped: {counts}" if counts else ""))
    notes += by_source(pairs, data, held_out)
    if not held_out and not console.quiet:
        notes += doubtful(pairs)
    if source.dropped:
        notes.append(f"the first dropped row is {source.dropped[0].place}: {source.dropped[0].detail}")
    for note in [*pairs.notes, *notes]:
        console.print(f"{title}: {note}", markup=False)
    if not held_out:
        ends = response_ends(tokenizer, ChatFormat.of(data))
        console.print(shown(pairs[0], tokenizer, ends, width=FIRST_PAIR_WIDTH), end="\n\n")
    list_rows(run_dir / "dropped.jsonl", title, dropped, held_out)
    return pairs, content


def check_reference(cfg: TrainConfig, loss: Loss, scorer: Scorer) -> None:
    """Refuse what looks at the reference where the loss has none."""
    if not loss.reference_free:
        return
    for key, value in (("data.scores", cfg.data.scores), ("reference_model", cfg.reference_model)):
        if value:
            raise UserError(f"{key}={value} has no effect: this loss needs no reference. Leave it out")
    if scorer.ranked_by == "reference_mean":
        raise UserError(
            f"scorer._target_={cfg.scorer['_target_']} ranks pairs by the reference, and this loss needs no "
            "reference: give scorer.margins_from, or choose another scorer"
        )


def list_rows(file: Path, title: str, rows: list[dict[str, Any]], held_out: bool) -> None:
    """List rows of the training pairs in a file of the run; those of the held-out pairs are added to it."""
    if not console.quiet and (rows or file.exists()):
        with file.open("a" if held_out else "w", encoding="utf-8") as out:
            out.writelines(json.dumps({"path": title, **row}) + "\n" for row in rows)


def build_curriculum(cfg: TrainConfig, scorer: Scorer, data: Data) -> tuple[Scorer, Curriculum]:
    """The scorer and the curriculum. With too few pairs to choose from they are those of plain DPO."""
    tokens = data.pairs.lengths()[:, 1:].sum(1)
    draws = *scorer.draws(cfg.batch_size), scorer.score_every
    setting = Setting(data.pairs.pass_rates(), tokens, data.steps, *draws, cfg.seed)
    if setting.trained < len(tokens):
        return scorer, build("curriculum", cfg.curriculum, setting=setting)
    if scorer.makes_scores or cfg.curriculum != {"_target_": "sage.curriculum.Curriculum"}:
        console.print(
            f"{len(tokens)} training pairs are too few to choose {setting.trained} of them at a time: "
            "the run trains on all of them, as +baseline=dpo does"
        )
    if cfg.batch_size > len(tokens):
        console.print(
            f"warning: batch_size={cfg.batch_size}, and there are {len(tokens)} training pairs: some are "
            "several times in each batch"
        )
    return Uniform(), Curriculum(setting)


def build_engine(
    cfg: TrainConfig, run_dir: Path, base: BaseModel, data: Data, device: torch.device
) -> tuple[Engine, PairForward]:
    """Load the policy, put it under the engine, and check it against the model's own code."""
    machine = this_machine(cfg.world_size, device, starting=True)
    with activity("loading the model"):
        policy = base.load(cfg.engine)
    with activity("checking log-probabilities against the model's own code"):
        known = check_policy(policy, base, cfg.engine, device, data.sets, cfg.data.packing)
    with activity("starting DeepSpeed"):
        engine = Engine(policy, cfg.engine, cfg.optimizer, base.dtype, device)
    with activity("checking log-probabilities under DeepSpeed"):
        layout = settle(engine, data.sets, cfg.data.packing, cfg.model.path, known)
    budget = settle_budget(cfg, run_dir, base, data.pairs, layout, machine)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the checks copy weights where memory is free
    return engine, PairForward(engine, budget, layout)


def restore(
    run_dir: Path, engine: Engine, forward: PairForward, selection: Selection, state: TrainState
) -> TrainState:
    """Load the newest checkpoint into the run's parts and return its state, or `state` if there is none."""
    if folder := checkpoint.newest_intact(run_dir):
        remedy = "start a new run, or delete this folder to resume from the one before"
        with activity(f"reading {folder.name}"), checkpoint.readable(folder, remedy):
            state = checkpoint.restore(engine, state, folder)
            selection.load_state_dict(state.selection)
        forward.costs.update(state.costs)
        console.print(f"resumed from {folder}", markup=False)
    elif (run_dir / METRICS_FILE).exists():
        console.print(f"{run_dir} has no checkpoint, so it starts again from its first step", markup=False)
    selection.log.rewind(state.step)
    if ranks.rank() == 0:
        for answers in (run_dir / "benchmarks").glob("step_*"):  # of steps that will be taken again
            if int(answers.name.removeprefix("step_")) > state.step:
                shutil.rmtree(answers)
    return state

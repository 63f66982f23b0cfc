"""A task with known truth: does the method find the pairs that it claims to find, and does finding them help?

    python benchmarks/synthetic.py [--methods NAME ...] [--shares 0.72 0.25 0.03 0] [--out FILE.json]

A pair is a vector x in R^160. The policy is the linear Bradley-Terry model. It writes one of two one-token
answers, and log pi(chosen) - log pi(rejected) = theta . x. The truth is w. The reference theta_0 is w with
noise, and with the wrong sign on 120 of the coordinates, which is a systematic error. x is turned so that
w . x > 0. It is then drawn by its margin under the reference, in units of that margin's standard deviation:

    mastered 40%         above 1             the reference is surely right
    boundary 20%         within 0.3 of 0     the reference does not know
    error 20%            below -1            the reference is surely wrong
    flipped 20%          any of the above, in their proportions, turned around: a wrong label

`--shares` gives other shares of the four.

Held-out accuracy is the share of clean pairs, in the proportions of the first three kinds, with
theta . x > 0. Difficulty is 1 - the share of 8 answers that theta_0 gets right by the label, which may be
flipped. The scorers, curricula and selection are the package's own, built from conf/. Only the model is
a toy.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from torch import Tensor

from sage.config import OptimizerConfig
from sage.curriculum import Setting
from sage.losses import Loss
from sage.model.logps import LogitStats, PairLogps
from sage.train import learning_rate
from sage.training.metrics import per_pair
from sage.training.pair_log import PairLog
from sage.training.selection import Selection
from sage.training.setup import build

MASTERED, BOUNDARY, ERROR, FLIPPED = range(4)
SHARES = (0.4, 0.2, 0.2, 0.2)
KNOWN, WRONG, LEAK, PAIRS, HELD_OUT, ANSWERS = 40, 120, 0.3, 4000, 2000, 8
BATCH, BETA = 32, 0.1
NOISE = 0.3
MARGIN_STD = 2.0  # of the reference's margins, in nats

WINDOW = 10
T_975 = (
    math.nan,
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # Student's t, by degrees of freedom
SEEDS, TUNING_SEEDS, LEARNING_RATES = range(10), range(100, 102), (5.0, 10.0, 20.0, 40.0)
HALF = 100  # steps; uniform gets twice as many
NOISY = [
    *["scorer=sage", "scorer.candidates_per_pair=3", "scorer.warmup_steps=10"],
    *["scorer.drop_negative=0.25", "scorer.temperature=0"],
]
METHODS: dict[str, list[str]] = {
    "uniform, twice the steps": [],
    "uniform": [],
    "loss": ["scorer=loss"],
    "gradient": ["scorer=gradient"],
    "margin_gap": ["scorer=margin_gap"],
    "easy": ["scorer=easy"],
    "beta_dpo": ["scorer=beta_dpo"],
    "static_easy_to_hard": ["curriculum=static_easy_to_hard"],
    "static_filter": ["curriculum=static_filter"],
    "curriculum=sage": ["curriculum=sage"],
    "sage (defaults)": ["scorer=sage"],
    "sage (defaults), curriculum=sage": ["scorer=sage", "curriculum=sage"],
    "sage (defaults), 3 candidates": ["scorer=sage", "scorer.candidates_per_pair=3"],
    "sage": NOISY,
    "sage, implicit_reward": [*NOISY, "scorer.margin=implicit_reward"],
    "sage, mixed": [*NOISY, "scorer.margin=mixed"],
    "sage, no drop_negative": [*NOISY, "scorer.drop_negative=0"],
    "sage, no warm-up": [*NOISY, "scorer.warmup_steps=0"],
    "sage, temperature 0.3": [*NOISY, "scorer.temperature=0.3"],
    "sage, mastered_above 1": [*NOISY, "scorer.mastered_above=1"],
    "sage, drop_curvature 0.2": [*NOISY, "scorer.drop_curvature=0.2"],
    "sage, 6 candidates": [*NOISY, "scorer.candidates_per_pair=6"],
    "sage, every 5 steps": [*NOISY, "scorer.score_every=5"],
    "sage, every 4, reused twice": [*NOISY, "scorer.score_every=4", "scorer.reuse=2"],
    "gates alone": ["scorer=random_from_pool", "scorer.warmup_steps=10", "scorer.drop_negative=0.25"],
    "sage_logit": [
        "scorer=sage_logit",
        "scorer.margin=policy_mean",
        "scorer.warmup_steps=10",
        "scorer.drop_negative=0.25",
    ],
    "sage, curriculum=sage": [*NOISY, "curriculum=sage"],
}


class Task:
    """The pairs of one seed, their kinds, and the policy with its gradient."""

    def __init__(self, seed: int, shares: tuple[float, ...]):
        rng = np.random.default_rng(seed)
        scale = MARGIN_STD / np.sqrt(np.r_[np.full(KNOWN, KNOWN), np.full(WRONG, WRONG)])
        self.truth = scale * rng.normal(size=KNOWN + WRONG)
        sign = np.r_[np.ones(KNOWN), -np.ones(WRONG)]
        noise = NOISE * scale * rng.normal(size=KNOWN + WRONG)
        self.start = torch.tensor(sign * self.truth + noise, dtype=torch.float32)
        self.x, self.kind = self.draw(rng, PAIRS, shares)
        clean = np.array(shares[:FLIPPED]) / sum(shares[:FLIPPED])
        self.held_out, self.held_out_kind = self.draw(rng, HELD_OUT, (*clean, 0.0))
        right = torch.sigmoid(self.x @ self.start).numpy()
        self.pass_rates = rng.binomial(ANSWERS, right) / ANSWERS
        self.theta, self.forward_pairs, self.backward_pairs = self.start.clone(), 0, 0

    def draw(self, rng: np.random.Generator, n: int, shares: tuple[float, ...]) -> tuple[Tensor, np.ndarray]:
        """n vectors [n, DIMENSIONS] and their kinds [n], in random order."""
        kind = rng.choice(4, n, p=shares)
        base = np.where(kind == FLIPPED, rng.choice(3, n, p=np.array(shares[:3]) / sum(shares[:3])), kind)
        bounds = {MASTERED: (1, np.inf), BOUNDARY: (-0.3, 0.3), ERROR: (-np.inf, -1)}
        x = np.empty((n, KNOWN + WRONG))
        for k, (low, high) in bounds.items():
            places, found = np.flatnonzero(base == k), np.empty((0, KNOWN + WRONG))
            skill = (np.arange(KNOWN + WRONG) >= KNOWN) == (k == ERROR)
            while len(found) < len(places):
                more = rng.normal(size=(4 * n, KNOWN + WRONG)) * np.where(skill, 1.0, LEAK)
                more *= np.sign(more @ self.truth)[:, None]
                margin = more @ self.start.double().numpy() / MARGIN_STD
                found = np.concatenate([found, more[(margin > low) & (margin < high)]])
            x[places] = found[: len(places)]
        x[kind == FLIPPED] *= -1
        return torch.tensor(x, dtype=torch.float32), kind

    def logps(self, theta: Tensor, indices: np.ndarray) -> PairLogps:
        margin, one = self.x[torch.from_numpy(indices)] @ theta, torch.ones(len(indices))
        return PairLogps(F.logsigmoid(margin), F.logsigmoid(-margin), one, one)

    # What Selection asks of the pairs, the reference and the forward.

    def pair_ids(self, indices: Any = slice(None)) -> np.ndarray:
        return np.array([str(i) for i in range(PAIRS)], dtype=object)[indices]

    def lookup(self, indices: np.ndarray) -> PairLogps:
        return self.logps(self.start, indices)

    def all_stats(self, pairs: Any, indices: np.ndarray, logit: bool) -> tuple[PairLogps, LogitStats]:
        self.forward_pairs += len(indices)
        logps = self.logps(self.theta, indices)
        chosen, rejected = (
            logps.chosen.exp(),
            logps.rejected.exp(),
        )  # one token each, out of a vocabulary of two
        s = chosen**2 + rejected**2
        return logps, LogitStats((1 - 2 * chosen + s) + (1 - 2 * rejected + s), 1 - s, 1 - s)

    def train(self, indices: np.ndarray, loss: Loss, lr: float) -> Tensor:
        """One step of gradient descent; returns PER_PAIR of the batch, [metrics, n]."""
        self.backward_pairs += len(indices)
        logps, reference = self.logps(self.theta, indices), self.lookup(indices)
        weight = loss.beta * torch.sigmoid(-loss.u(logps, reference))
        self.theta = self.theta + lr * (weight[:, None] * self.x[torch.from_numpy(indices)]).mean(0)
        return per_pair(loss, loss(logps, reference), logps, reference)

    def accuracy(self) -> float:
        return float((self.held_out @ self.theta > 0).float().mean())


new_task = functools.cache(Task)


@functools.cache
def composed(*overrides: str) -> Any:
    with initialize_config_module("sage.conf", version_base="1.3"):
        return compose("train", ["+baseline=dpo", "data.path=none", f"loss.beta={BETA}", *overrides])


def run(
    overrides: list[str], seed: int, steps: int, lr: float, shares: tuple[float, ...]
) -> dict[str, list[float]]:
    """Per step: held-out accuracy, shares of errors and flipped labels in the batch, and the cost so far."""
    cfg, task = composed(*overrides), copy.copy(new_task(seed, shares))
    scorer = build("scorer", cfg.scorer)
    setting = Setting(task.pass_rates, np.ones(PAIRS, np.int64), steps, *scorer.draws(BATCH), 1, seed)
    curriculum = build("curriculum", cfg.curriculum, setting=setting)
    loss: Any = build("loss", cfg.loss)
    log = PairLog(Path("."), expected=1, limit=0, main=False)
    selection = Selection(scorer, curriculum, loss, task, task, task, log, BATCH, seed)  # pyright: ignore
    history: dict[str, list[float]] = {"accuracy": [], "errors": [], "flipped": [], "cost": []}
    for step in range(steps):
        choice = selection.choose(step)
        if not len(choice.indices):
            break
        rate = learning_rate(step, steps, OptimizerConfig(lr=lr, warmup_ratio=0))
        selection.observe(choice.indices, task.train(choice.indices, choice.objective, rate))
        kinds = task.kind[choice.indices]
        history["accuracy"].append(task.accuracy())
        history["errors"].append(float((kinds == ERROR).mean()))
        history["flipped"].append(float((kinds == FLIPPED).mean()))
        history["cost"].append(task.forward_pairs + 3.0 * task.backward_pairs)
    return history


def steps_of(name: str) -> int:
    return 2 * HALF if name.endswith("twice the steps") else HALF


def tune(name: str, shares: tuple[float, ...]) -> float:
    """The learning rate that ends best on seeds that the table does not use."""
    ends = {
        lr: np.mean(
            [run(METHODS[name], seed, steps_of(name), lr, shares)["accuracy"][-1] for seed in TUNING_SEEDS]
        )
        for lr in LEARNING_RATES
    }
    return max(ends, key=lambda lr: ends[lr])


def summary(history: dict[str, list[float]], goal: float) -> dict[str, float]:
    """One run: final accuracy, trained pairs until it reaches `goal`, and the kinds in its batches."""
    accuracy, errors, flipped = (np.array(history[k]) for k in ("accuracy", "errors", "flipped"))
    reached = np.flatnonzero(accuracy >= goal)
    return {
        "final": accuracy[-1],
        "pairs": BATCH * (reached[0] + 1) if len(reached) else math.inf,
        "cost": history["cost"][reached[0]] if len(reached) else math.inf,
        "errors": max(errors[i : i + WINDOW].mean() for i in range(50 - WINDOW + 1)),
        "flipped": flipped[:50].mean(),
    }


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95% interval over the seeds (Student's t), of those that are finite."""
    v = np.array(values)[np.isfinite(values)]
    if len(v) < 2:
        return "never" if not len(v) else f"{v[0]:.3g} (1 of {len(values)})"
    half = T_975[len(v) - 1] * v.std(ddof=1) / math.sqrt(len(v))
    return f"{v.mean():.4g} ± {half:.2g}" + (f" ({len(v)} of {len(values)})" if len(v) < len(values) else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--shares", nargs=4, type=float, default=SHARES, metavar="SHARE")
    parser.add_argument("--out", type=Path, help="write every run's history as JSON")
    args = parser.parse_args()
    shares = tuple(args.shares)
    histories: dict[str, list[dict[str, list[float]]]] = {}
    goals: list[float] = []
    print(
        "| method | lr | final accuracy | pairs to the goal | cost to it "
        "| errors, best 10 of the first 50 steps | flipped, first 50 |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys([next(iter(METHODS)), *args.methods]):
        lr = tune(name, shares)
        histories[name] = [run(METHODS[name], seed, steps_of(name), lr, shares) for seed in SEEDS]
        goals = goals or [h["accuracy"][-1] for h in histories[name]]
        rows = [summary(h, goal) for h, goal in zip(histories[name], goals, strict=True)]
        cells = [interval([row[k] for row in rows]) for k in ("final", "pairs", "cost", "errors", "flipped")]
        print("|", " | ".join([name, f"{lr:g}", *cells]), "|", flush=True)
    if args.out:
        args.out.write_text(json.dumps(histories))


if __name__ == "__main__":
    main()

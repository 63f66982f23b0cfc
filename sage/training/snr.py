"""The signal-to-noise ratio of updates: how much of a batch's gradient its pairs have in common.

Let g be the gradient of one pair's loss. Its signal is |E g|^2 and its noise is tr Cov(g). The quotient tr
Cov(g) / |E g|^2 is the gradient noise scale of McCandlish et al., arXiv 1812.06162, equation 2.8. An update
averages B pairs, so its signal-to-noise ratio is B |E g|^2 / tr Cov(g).

The step's own micro-batches cannot serve as samples. They are cut by length, and gradients depend on length,
so their means differ by more than chance. Therefore the batch is cut again, at random, and its gradient is
taken a second time by `torch.autograd.grad` on the module itself. That touches neither .grad nor DeepSpeed's
hooks, so training is bit for bit the same. The price is one more forward and backward of each measured batch,
and memory for two more gradients, one of them in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sage.data.packing import collate, micro_tokens, pair_tokens
from sage.losses import Loss
from sage.training.hooks import Hook
from sage.training.run import Run
from sage.training.selection import Choice
from sage.util import ranks

MIN_GROUPS = 8  # the standard error of tr Cov from k groups can reach sqrt(2 / (k - 1)) of its value


class Moments(NamedTuple):
    signal: float  # |E g|^2. Its unbiased estimate may be negative, if the noise hides it
    noise: float  # tr Cov(g), of one pair

    def snr(self, pairs: int) -> float:
        """Of an update that averages this many pairs. NaN if all gradients are equal."""
        return pairs * self.signal / self.noise if self.noise > 0 else math.nan


def estimate(pairs: int, groups: int, sum_of_squares: float, squared_mean: float) -> Moments:
    """Unbiased moments of the gradient of one pair.

    They come from k groups of b_i pairs (B in all) with mean gradients g_i.

    E |g_i|^2 = |E g|^2 + tr Cov(g) / b_i. So sum_i b_i |g_i|^2 - B |mean|^2 is k - 1 times tr Cov(g) on
    average, and
    |mean|^2 exceeds |E g|^2 by tr Cov(g) / B. This is a one-way analysis of variance, for equal and unequal
    b_i. Over random groups of one given batch, the average noise is the trace of that batch's sample
    covariance.

    Args:
        pairs, groups: B and k.
        sum_of_squares: sum_i b_i |g_i|^2.
        squared_mean: |sum_i b_i g_i / B|^2.

    Raises:
        ValueError: there is only one group, which does not show how gradients differ.
    """
    if groups < 2:
        raise ValueError("the noise of a gradient cannot be estimated from a single group of pairs")
    noise = (sum_of_squares - pairs * squared_mean) / (groups - 1)
    return Moments(squared_mean - noise / pairs, noise)


def cut(indices: np.ndarray, most: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random groups of at most `most` pairs, and at least MIN_GROUPS groups if there are that many pairs.

    Their sizes differ by at most one and depend on no pair. Groups whose size followed their pairs' lengths
    would be biased.
    """
    groups = min(len(indices), max(MIN_GROUPS, -(-len(indices) // most)))
    return np.array_split(rng.permutation(indices), groups)


class SNR(Hook):
    """Measures every `every` steps, as snr/*."""

    def __init__(self, every: int):
        self.every = every

    def before_step(self, run: Run, choice: Choice) -> dict[str, float]:
        return {} if (run.state.step + 1) % self.every else measure(run, choice)


def measure(run: Run, choice: Choice) -> dict[str, float]:
    """Metrics of the batch about to be trained on, and of as many pairs drawn uniformly from its candidates.

    Without selection the two are one batch, which is measured once. Every rank calls this. A quotient is left
    out if the estimates do not give it: there is no noise, or the uniform signal is not above 0. To average
    several measurements, average signal and noise separately and divide last.
    """
    started = time.perf_counter()
    chosen, candidates, objective = choice.indices, choice.candidates, choice.objective
    rng = np.random.default_rng((run.cfg.seed, run.state.step))
    with torch.random.fork_rng([run.engine.device] if run.engine.device.type == "cuda" else []):
        selected = uniform = batch_moments(run, objective, chosen, rng)
        if len(candidates) > len(chosen):
            others = rng.choice(candidates, len(chosen), replace=False)
            uniform = batch_moments(run, objective, others, rng)
    values = {
        "snr/selected": selected.snr(len(chosen)),
        "snr/uniform": uniform.snr(len(chosen)),
        "snr/ratio": selected.snr(len(chosen)) / uniform.snr(len(chosen)) if uniform.signal > 0 else math.nan,
        "snr/selected_signal": selected.signal,
        "snr/selected_noise": selected.noise,
        "snr/uniform_signal": uniform.signal,
        "snr/uniform_noise": uniform.noise,
        "cost/snr_pairs": run.forward.costs["snr_pairs"],
        "cost/snr_tokens": run.forward.costs["snr_tokens"],
        "time/snr_seconds": time.perf_counter() - started,
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def batch_moments(run: Run, objective: Loss, indices: np.ndarray, rng: np.random.Generator) -> Moments:
    """Moments of the objective's gradient in the trained parameters, from all ranks' pairs `indices`."""
    forward, engine = run.forward, run.engine
    prefix = forward.prefix(run.pairs)
    lengths = run.pairs.lengths()
    largest = int(pair_tokens(lengths[indices], forward.layout, prefix).max())
    groups = cut(indices, max(1, (forward.budget - prefix) // largest), rng)
    forward.costs["snr_pairs"] += len(indices)
    for group in groups:
        tokens, _ = micro_tokens(lengths[group], run.pairs.keys(group), forward.layout, prefix)
        forward.costs["snr_tokens"] += tokens

    parameters = [p for p in engine.policy.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    sum_of_squares = torch.zeros((), dtype=torch.float64, device=engine.device)
    for group in groups[ranks.rank() :: ranks.world_size()]:
        batch = collate([run.pairs[int(i)] for i in group], forward.layout, prefix).to(engine.device)
        losses = objective(engine.policy(batch), run.reference(group, batch))
        gradients = torch.autograd.grad(losses.mean(), parameters, materialize_grads=True)
        sum_of_squares += len(group) * squared_norm(gradients)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_.add_(gradient, alpha=len(group))
    total = [ranks.total(sum_) for sum_ in total]
    squared_mean = float(squared_norm(total)) / len(indices) ** 2
    return estimate(len(indices), len(groups), float(ranks.total(sum_of_squares)), squared_mean)


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The squared norm of all tensors as one vector, a float64 scalar."""
    return torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).square().sum()

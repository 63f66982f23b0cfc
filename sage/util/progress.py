"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere. Rank 0 speaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sage.util import ranks

T = TypeVar("T")
console = Console(quiet=ranks.rank() != 0, soft_wrap=True, highlight=False)


def bar(*extra: TextColumn) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *extra,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=not extra,
    )


def track(
    items: Iterable[T], description: str | None, total: int, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield `items` and show how many of `total` are done: an item counts for `size(item)`.

    Silent without a description.
    """
    if description is None or console.quiet:
        yield from items
        return
    if not console.is_terminal:
        console.print(f"{description}: {total}")
        yield from items
        return
    with bar() as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task, size(item))


def track_counts(items: Sequence[T], description: str, counts: Sequence[int]) -> Iterator[T]:
    """Pass items on and show how many of sum(counts) are done: item i counts for counts[i]."""
    total, done, started = sum(counts), 0, time.monotonic()
    progress = bar() if console.is_terminal and not console.quiet else None
    with progress or nullcontext():
        task = progress.add_task(description, total=total) if progress else None
        for item, count in zip(items, counts, strict=True):
            yield item
            done += count
            if progress and task is not None:
                progress.advance(task, count)
            else:
                remaining = (time.monotonic() - started) / done * (total - done)
                console.print(f"{description}: {done}/{total}  ETA {remaining:.0f}s")


class StepProgress:
    """The training bar, or one line per log event where output is not a terminal."""

    def __init__(self, done: int, total: int):
        self.total = total
        self.progress = bar(TextColumn("{task.fields[metrics]}")) if console.is_terminal else None
        self.start, self.done = time.monotonic(), done
        if self.progress:
            self.task = self.progress.add_task("align", total=total, completed=done, metrics="")

    def __enter__(self) -> StepProgress:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.progress:
            self.progress.stop()

    def step(self, step: int, metrics: dict[str, float] | None) -> None:
        text = (
            ""
            if metrics is None
            else (
                f"loss {metrics['loss']:.4f}  acc {metrics['rewards/accuracies']:.2f}  "
                f"margin {metrics['rewards/margins']:+.3f}  {metrics['time/pairs_per_second']:.2f} pairs/s"
            )
        )
        if self.progress:
            self.progress.update(self.task, completed=step)
            if text:
                self.progress.update(self.task, metrics=text)
        elif text:
            remaining = (time.monotonic() - self.start) / max(step - self.done, 1) * (self.total - step)
            console.print(f"step {step}/{self.total}  {text}  ETA {remaining:.0f}s")


def print_summary(summary: dict[str, Any]) -> None:
    """The table at the end of a run: held-out metrics before and after, then cost and where things are."""
    before, after = summary["before"], summary["after"]
    if after:
        table = Table(title="before and after", title_justify="left")
        table.add_column(f"on {int(after['eval/pairs'])} held-out pairs" if "eval/pairs" in after else "")
        for name in ("before", "after"):
            table.add_column(name, justify="right")
        for metric, label in (
            ("eval/policy_accuracies", "accuracy, by length-normalised policy margin"),
            ("eval/policy_margins", "length-normalised policy margin (nats/token)"),
            ("eval/rewards/accuracies", "accuracy, by implicit reward"),
            ("eval/rewards/margins", "implicit reward margin"),
            ("eval/loss", "loss"),
            ("eval/logps/chosen", "log-probability of chosen"),
            ("eval/logps/rejected", "log-probability of rejected"),
            *((name, f"{name.split('/')[1]}, accuracy") for name in after if name.endswith("/accuracy")),
        ):
            if metric in after:
                table.add_row(label, f"{before[metric]:.4f}", f"{after[metric]:.4f}")
        console.print(table)
    facts = Table(show_header=False, box=None)
    facts.add_row("speed", f"{summary['pairs_per_second']:.2f} pairs/s over {summary['steps']} steps")
    facts.add_row("peak memory", f"{summary['peak_memory_gb']:.2f} GB per rank ({summary['memory_kind']})")
    if best := summary["best"]:
        value = "never finite" if best["value"] is None else f"{best['value']:.4g} at step {best['step']}"
        facts.add_row("best", f"{best['metric']} {value}")
        if best["value"] is not None:
            facts.add_row("best model", best["folder"])
    facts.add_row("model", summary["final"])
    facts.add_row("metrics", summary["metrics"])
    console.print(facts)

"""What a person sees while a run goes on: live lines on a terminal, plain lines elsewhere. Rank 0 speaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from sage.util import ranks

T = TypeVar("T")
console = Console(quiet=ranks.rank() != 0, soft_wrap=True, highlight=False)
LINE_EVERY = 30.0  # seconds between plain lines about one activity
SLOW = 10.0  # an activity that took so many seconds leaves a line that says so
WIDE = 100  # columns of a terminal that has room for a bar beside the numbers


class Activity:
    """Something that takes time. Where `total` is known, it shows how much is done and the time left.

    `facts` are short texts about it, the most important first: a narrow terminal shows only the first ones.
    """

    def __init__(self, description: str, total: int | None = None, done: int = 0):
        self.description, self.total, self.done, self.begun_at = description, total, done, done
        self.started = self.moved = self.said = time.monotonic()
        self.facts: list[str] = []

    def advance(self, count: int = 1) -> None:
        """`count` more are done. Without a terminal this prints a line, but only every LINE_EVERY seconds."""
        self.done, self.moved = self.done + count, time.monotonic()
        if not console.is_terminal and self.moved - self.said > LINE_EVERY:
            self.say()

    def say(self) -> None:
        """Print this as a line."""
        self.said = time.monotonic()
        console.print(str(self), markup=False)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def head(self) -> str:
        return self.description if self.total is None else f"{self.description} {self.done}/{self.total}"

    @property
    def tail(self) -> str:
        """The time left by the pace so far, or the time that has passed where the total is not known."""
        if self.total is None:
            return clock(self.seconds)
        if self.done == self.begun_at:
            return ""
        pace = (self.moved - self.started) / (self.done - self.begun_at)
        left = pace * (self.total - self.done) - (time.monotonic() - self.moved)
        return f"{clock(max(left, 0.0))} left"

    def __str__(self) -> str:
        return "  ".join(text for text in (self.head, *self.facts, self.tail) if text)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Table]:
        room = options.max_width - len(self.head) - len(self.tail) - 3
        shown = [fact for n, fact in enumerate(self.facts) if len("  ".join(self.facts[: n + 1])) <= room]
        full = self.facts and options.max_width < WIDE
        bar = "" if full else ProgressBar(self.total, self.done, pulse=self.total is None)
        fixed = [Column(no_wrap=True) for _ in range(3)]
        line = Table.grid(fixed[0], fixed[1], Column(ratio=1), fixed[2], expand=True)
        line.add_row(
            f"{self.head}  ", "  ".join([*shown, ""]) if bar else "  ".join(shown), bar, f" {self.tail}"
        )
        yield line


def clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


_now: list[Activity] = []  # what goes on, the outermost first
_live: list[Live] = []  # the one display that shows it


@contextmanager
def activity(description: str, total: int | None = None, done: int = 0) -> Iterator[Activity]:
    """Show that something goes on for as long as the block lasts. Activities may contain others.

    An activity that took more than SLOW seconds leaves a line. Without a terminal, one is also printed at the
    start.
    """
    one = Activity(description, total, done)
    if console.quiet or total == 0:
        yield one
        return
    if not console.is_terminal:
        console.print(description if total is None else f"{description}: {total}", markup=False)
        yield one
    else:
        with displayed(one):
            yield one
    if one.seconds > SLOW:
        console.print(f"{description}: done in {clock(one.seconds)}", markup=False)


@contextmanager
def displayed(one: Activity) -> Iterator[None]:
    _now.append(one)
    if not _live:
        console.file = console.file  # also while a library's output is redirected
        _live.append(Live(get_renderable=lambda: Group(*_now), console=console, transient=True))
        _live[0].start()
    try:
        yield
    finally:
        _now.remove(one)
        if not _now:
            _live.pop().stop()
            console.file = None  # pyright: ignore[reportAttributeAccessIssue]


def track(
    items: Iterable[T], description: str | None, total: int, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield `items` and show how many of `total` are done: an item counts for `size(item)`.

    Silent without a description.
    """
    if description is None:
        yield from items
        return
    with activity(description, total) as one:
        for item in items:
            yield item
            one.advance(size(item))


class Steps(Activity):
    """The training line, or one line per log event where output is not a terminal."""

    def advance(self, count: int = 1) -> None:
        self.done, self.moved = self.done + count, time.monotonic()

    def step(self, metrics: Mapping[str, float] | None) -> None:
        """A step is done. `metrics` are what it logged, if it did."""
        self.advance()
        if metrics is not None:
            self.facts = facts(metrics)
            if not console.is_terminal:
                self.say()


@contextmanager
def steps(done: int, total: int) -> Iterator[Steps]:
    """Show the steps of a training run that has done some of them already."""
    one = Steps("step", total, done)
    with displayed(one) if console.is_terminal and not console.quiet else nullcontext():
        yield one
    if console.is_terminal and one.facts:
        one.say()  # the live line has disappeared


def facts(metrics: Mapping[str, float]) -> list[str]:
    """What the training line says about a step, the most important first."""
    shown = [f"loss {metrics['loss']:.4f}", f"acc {metrics['rewards/accuracies']:.2f}"]
    if "selection/share" in metrics:
        shown.append(f"chosen {metrics['selection/share']:.0%}")
    speed = metrics["time/pairs_per_second"]
    shown.append(f"{speed:.0f} pairs/s" if speed >= 100 else f"{speed:.3g} pairs/s")
    return [*shown, f"margin {metrics['rewards/margins']:+.3f}"]


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

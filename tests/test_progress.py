"""What a run shows while it goes on: it fits the terminal, and says what matters first."""

from __future__ import annotations

import io
import re
import time
from contextlib import redirect_stdout

import pytest
from rich.console import Console

from sage.util import progress
from sage.util.progress import Activity, Steps, activity, track

METRICS = {
    "loss": 0.61234,
    "rewards/accuracies": 0.71,
    "rewards/margins": 0.1234,
    "time/pairs_per_second": 1234.56,
    "selection/share": 0.25,
}


@pytest.fixture
def plain(monkeypatch) -> io.StringIO:
    """Output that is no terminal."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, soft_wrap=True, highlight=False))
    return out


def drawn(one: Activity, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system="standard").print(one)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).rstrip("\n")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_training_line_fits(plain, width):
    """A long run of a fast model: nothing is cut off, the time left is whole, and less room shows less."""
    one = Steps("step", 100_000)
    one.done, one.started = 99_000, one.started - 99_001 * 0.6
    one.step(METRICS)
    line = drawn(one, width)
    assert "\n" not in line and len(line) <= width and "…" not in line
    assert line.startswith("step 99001/100000  loss 0.6123  acc 0.71")
    assert line.endswith(" 0:09:59 left")  # 999 steps of 0.6 seconds
    assert ("chosen 25%" in line) == ("1235 pairs/s" in line) == (width >= 80)
    assert ("margin +0.123" in line) == ("━" in line) == (width >= 100)


@pytest.mark.parametrize("width", [80, 140])
def test_phases_fit(plain, width):
    one = Activity("reference log-probabilities of the training pairs", 123_456)
    one.started -= 10
    one.advance(1234)
    line = drawn(one, width)
    assert len(line) <= width and "\n" not in line and "…" not in line and "━" in line
    assert line.startswith("reference log-probabilities of the training pairs 1234/123456")
    assert line.endswith(" 0:16:30 left")  # 122,222 more at 123.4 a second
    unknown = drawn(Activity("loading the model"), width)
    assert unknown.startswith("loading the model") and unknown.endswith(" 0:00:00") and len(unknown) <= width


def test_plain_lines(plain, monkeypatch):
    """In a file: a line at the start, then one per interval, and one at the end of what was slow."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    monkeypatch.setattr(progress, "SLOW", 0.05)
    for _ in track(range(3), "held-out pairs", 6, lambda _: 2):
        time.sleep(0.06)
    with activity("loading the model"):
        pass
    lines = plain.getvalue().splitlines()
    assert lines[0] == "held-out pairs: 6" and lines[-1] == "loading the model"
    assert [line.split("  ")[0] for line in lines[1:4]] == [f"held-out pairs {n}/6" for n in (2, 4, 6)]
    assert lines[4] == "held-out pairs: done in 0:00:00" and len(lines) == 6
    assert list(track([1, 2], None, 2)) == [1, 2] and len(plain.getvalue().splitlines()) == 6


def test_activities_nest_on_a_terminal(monkeypatch):
    """Protects an evaluation within training, which has a line of its own: some versions of rich refuse two
    displays. Output of libraries that somebody redirects does not take the display's with it.
    """
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(progress, "console", Console(width=80, force_terminal=True, color_system=None))
    with progress.steps(0, 4) as one:
        one.step(METRICS)
        for _ in track(range(2), "held-out pairs", 2):
            assert len(progress._now) == 2 and len(progress._live) == 1
            with redirect_stdout(io.StringIO()) as other:
                progress._live[0].refresh()
            assert not other.getvalue() and "held-out pairs" in out.getvalue()
        one.step(None)
    assert not progress._now and not progress._live
    assert out.getvalue().rstrip().endswith("left") and "step 2/4  loss 0.6123" in out.getvalue()

"""Pictures as SVG text, drawn by matplotlib. Their text and axes take the page's colour, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"  # stands for the page's own colour until the SVG is written
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sage",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titley": 1.0,  # matplotlib would look for room above the ticks, a third of the time of a picture
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"),
        INK,
    ),
}
WIDTH, HEIGHT = 4.6, 2.7  # inches


class Curve(NamedTuple):
    """A line, and the interval around it where `low` and `high` differ from it: [n] each."""

    color: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def palette(n: int) -> list[str]:
    """n colours that can be told apart on light and on dark ground."""
    if n <= 10:
        return [to_hex(c) for c in matplotlib.colormaps["tab10"].colors[:n]]  # pyright: ignore
    return [to_hex(matplotlib.colormaps["turbo"](x)) for x in np.linspace(0.08, 0.92, n)]


def svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element that may stand in a page beside others."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{title}"', text, count=1)
    # A hundredth of a point is enough for a line, and makes a page much smaller.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return text.replace(INK, "currentColor")


def blank(bottom: float = 0.18) -> tuple[Figure, Axes]:
    """An empty picture. Its margins are fixed, because fitting them takes longer than all the rest."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.14, right=0.97, top=0.89, bottom=bottom)
    return figure, axes


@cache
def empty_canvas() -> tuple[Figure, Axes]:
    figure, axes = blank()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def canvas() -> tuple[Figure, Axes]:
    """The picture that all pictures of curves are drawn on, without the last one's curves.

    To make new axes for each takes half of the time.
    """
    figure, axes = empty_canvas()
    for artist in (*axes.lines, *axes.collections):
        artist.remove()
    axes.relim()
    return figure, axes


def lines(title: str, curves: Sequence[Curve], x_label: str) -> str | None:
    """Curves over one axis; None where no curve has a finite value."""
    curves = [curve for curve in curves if np.isfinite(curve.y).any()]
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas()
        for color, x, y, low, high in curves:
            few = np.isfinite(y).sum() < 12
            axes.plot(x, y, color=color, linewidth=1.4, marker="." if few else None, markersize=4)
            if (np.asarray(low) != np.asarray(y)).any():
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x_label)
        axes.autoscale_view()
        return svg(figure, title)


def areas(title: str, x: np.ndarray, parts: np.ndarray, names: Sequence[str], x_label: str) -> str:
    """Shares [n, k] stacked over x [n]; for a single x, one bar."""
    with matplotlib.rc_context(STYLE):
        figure, axes = blank(bottom=0.32)
        colors = palette(len(names))
        if len(x) == 1:
            bottom = 0.0
            for share, name, color in zip(parts[0], names, colors, strict=True):
                axes.bar([str(x[0])], [share], bottom=bottom, color=color, label=name, width=0.3)
                bottom += share
        else:
            axes.stackplot(x, parts.T, labels=names, colors=colors, alpha=0.85, linewidth=0)
            axes.set_xlim(x[0], x[-1])
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x_label)
        axes.grid(False)
        figure.legend(loc="lower center", ncols=3, fontsize=7)
        return svg(figure, title)


def histograms(title: str, values: dict[str, np.ndarray], x_label: str) -> str | None:
    """Distributions over common bins, each as a share of its own count; None without finite values."""
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    finite = {name: v for name, v in finite.items() if len(v)}
    if not finite:
        return None
    everything = np.concatenate(list(finite.values()))
    low, high = np.quantile(everything, [0.005, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    with matplotlib.rc_context(STYLE):
        figure, axes = blank()
        for (name, v), color in zip(finite.items(), palette(len(finite)), strict=True):
            counts, edges = np.histogram(np.clip(v, low, high), 40, (low, high))
            axes.stairs(counts / len(v), edges, color=color, label=name, fill=True, alpha=0.35)
            axes.stairs(counts / len(v), edges, color=color)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel("share")
        axes.legend(fontsize=8)
        return svg(figure, title)

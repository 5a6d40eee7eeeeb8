"""Figures of experiments and benchmarks, as PNG files by matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


@contextmanager
def drawn_figure(path: Path, x_title: str, y_title: str = "", size: tuple[float, float] = (8, 5)) -> Iterator[Axes]:
    """Axes to draw on; at the end of the block, the figure is written with a grid and a legend of named lines."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    yield axes
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def mark_counts(axes: Axes, counts: Sequence[int]) -> None:
    """Use a logarithmic axis for numbers of labelled cases, each of which is about twice the previous one."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])

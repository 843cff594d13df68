"""A benchmark's result: a table on the terminal, and the same table and a plot as a page of `docs/benchmarks/`."""

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from parallel.process.cores import available_cores

FOLDER = Path("docs/benchmarks")

#: Draws into matplotlib axes.
Plot = Callable[[Any], None]


class Report:
    """One benchmark's rows, in the order in which they are added."""

    def __init__(self, name: str, *, title: str, about: str, headings: Sequence[str]) -> None:
        """`name` is the module's and the page's; `about` says what was run, in Markdown."""
        self._name = name
        self._title = title
        self._about = about
        self._headings = headings
        self._rows: list[Sequence[str]] = []
        self._notes: list[str] = []

    def add(self, *cells: str) -> None:
        """Adds a row."""
        assert len(cells) == len(self._headings), f"{len(cells)} cells under {len(self._headings)} headings"
        self._rows.append(cells)

    def note(self, sentence: str) -> None:
        """Adds a line under the table."""
        self._notes.append(sentence)

    def publish(self, plot: Plot, *, folder: Path = FOLDER) -> None:
        """Prints the table and writes `<folder>/<name>.md` and, where matplotlib is installed, `<name>.svg`."""
        console = Console()
        console.width = max(console.width, 120)  # of a pipe it takes 80 for granted
        table = Table(title=self._title)
        for index, heading in enumerate(self._headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self._rows:
            table.add_row(*row)
        console.print(table, *self._notes, sep="\n")
        folder.mkdir(parents=True, exist_ok=True)
        has_plot = _draw(plot, title=self._title, path=folder / f"{self._name}.svg")
        page = folder / f"{self._name}.md"
        page.write_text(self._page(has_plot=has_plot))
        console.print(f"written: {page}" + ("" if has_plot else " (no plot: `pip install .[dev]` brings matplotlib)"))

    def _page(self, *, has_plot: bool) -> str:
        parts = [f"# {self._title}", self._about, _machine(), self._markdown_table()]
        if self._notes:
            parts.append("\n".join(f"- {note}" for note in self._notes))
        if has_plot:
            parts.append(f"![{self._title}]({self._name}.svg)")
        parts.append(f"Made by `python -m benchmarks.{self._name}`.")
        return "\n\n".join(parts) + "\n"

    def _markdown_table(self) -> str:
        rule = ["---", *["---:"] * (len(self._headings) - 1)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self._headings, rule, *self._rows))


def _draw(plot: Plot, *, title: str, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    # A constant salt: the same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "muster"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    plot(axes)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _machine() -> str:
    cores = available_cores()
    load = os.getloadavg()[1]
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return (
        f"{today}, {_cpu_model()}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"float32; the system's load over the last 5 minutes was {load:.1f}, this benchmark's own included."
    )


def _cpu_model() -> str:
    """The processor as the system names it, with the widest vectors that torch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
        name = next(names, name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"

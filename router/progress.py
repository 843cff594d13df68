"""Shows how a start-up goes: bars on a terminal, a log line for each phase that ends elsewhere."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)

PHASES = ("launchers", "groups", "weights", "ranks", "warm-up")


class StartProgress:
    """The phases of a start-up, each a number of parts whose fractions add up."""

    def __init__(self, display: Progress | None) -> None:
        self._display = display
        self._tasks: dict[str, TaskID] = {}
        self._parts: dict[str, dict[object, float]] = {phase: {} for phase in PHASES}
        self._totals: dict[str, int] = {}

    def begin(self, phase: str, *, parts: int) -> None:
        """Announces a phase of `parts` equal parts."""
        self._totals[phase] = parts
        if self._display is not None:
            self._tasks[phase] = self._display.add_task(phase, total=parts)

    def advance(self, phase: str, part: object, fraction: float = 1.0) -> None:
        """Says how much of one part is done."""
        if phase not in self._totals:
            return  # a phase that only newer ranks have
        before = sum(self._parts[phase].values())
        self._parts[phase][part] = max(fraction, self._parts[phase].get(part, 0.0))
        done = sum(self._parts[phase].values())
        if self._display is not None and phase in self._tasks:
            self._display.update(self._tasks[phase], completed=done)
        if before < self._totals[phase] <= done:
            logger.info("start: phase=%s done parts=%d", phase, self._totals[phase])


@contextmanager
def start_progress(console: Console) -> Iterator[StartProgress]:
    """A display on a terminal, none elsewhere."""
    if not console.is_terminal:
        yield StartProgress(None)
        return
    columns = (TextColumn("{task.description:>10}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as display:
        yield StartProgress(display)

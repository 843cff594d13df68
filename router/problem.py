"""What is wrong with a configuration: one sentence a problem, each with its place in the file and a remedy."""

from collections.abc import Iterable
from dataclasses import dataclass

import yaml

#: The keys and list indices that lead to a value: ("hosts", 0, "address").
KeyPath = tuple[str | int, ...]

_LONGEST_VALUE = 80
#: Problems that are told one by one; a screen or two.
_MOST_TOLD = 100


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One fault. `line` and `column` count from 1; `value` is as the file writes it, None where it has none there."""

    file: str
    line: int
    column: int
    path: KeyPath
    value: str | None
    what: str
    remedy: str

    @property
    def key(self) -> str:
        """The path as text: `hosts[0].address`."""
        return key_text(self.path)

    def __str__(self) -> str:
        subject = self.key if self.value is None else f"{self.key} = {self.value}"
        return f"{self.file}:{self.line}: {subject}{': ' if subject else ''}{self.what}; {self.remedy}"


class ConfigError(Exception):
    """The problems that were found, ordered by place; its text has one line for each of the first hundred."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(dict.fromkeys(problems), key=lambda problem: (problem.line, problem.column)))
        lines = list(map(str, self.problems[:_MOST_TOLD]))
        if len(self.problems) > _MOST_TOLD:
            lines.append("... and more: mend these first")
        super().__init__("\n".join(lines))


def key_text(path: KeyPath) -> str:
    """`path` as people write it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def value_text(value: object) -> str:
    """`value` on one line of YAML, cut where it is long; text that would read as something else keeps its quotes."""
    if isinstance(value, str) and value.isprintable() and _reads_as_itself(value):
        return _cut(value)
    flow = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return _cut(" ".join(flow.strip()[1:-1].split()))


def plain_text(text: str) -> str:
    """`text` on one line without quotes, cut where it is long; a question mark stands for what cannot be printed."""
    return _cut("".join(character if character.isprintable() else "?" for character in " ".join(text.split())))


def _reads_as_itself(text: str) -> bool:
    try:
        return bool(yaml.safe_load(text) == text)
    except (yaml.YAMLError, ValueError):
        return False


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."

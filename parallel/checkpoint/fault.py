"""One thing that is wrong with a checkpoint: what, and what to do about it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault in words, without its remedy, and the remedy."""

    what: str
    remedy: str

    @classmethod
    def of(cls, error: Exception, *, remedy: str) -> "Fault":
        """The fault that an error's text says, as `what; remedy`; `remedy` where it says none."""
        what, _, own = str(error).rpartition("; ")
        return cls(what=what, remedy=own) if what else cls(what=own, remedy=remedy)

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def few(names: Iterable[str]) -> str:
    """The first of `names`, and how many more there are."""
    listed: Sequence[str] = list(names)
    rest = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

"""A YAML file as plain data that remembers where each key stands, and what YAML itself would let pass in silence.

`yaml.safe_load` keeps the last of two equal keys, reads an empty value as null, and writes aliases out however many
values they make of a few: all are faults here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from router.problem import ConfigError, KeyPath, Problem, key_text, plain_text, value_text
from router.yaml_surprises import surprise

_MERGE_TAG = "tag:yaml.org,2002:merge"
#: A file for ten thousand hosts has one of these; a larger one is no topology, and takes YAML minutes.
_MOST_BYTES = 1 << 20
#: Levels of lists and mappings; a topology has six.
_DEEPEST = 32
#: What aliases may repeat, in values.
_MOST_REPEATED = 20_000


@dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """`data` holds what the file says, `places` line and column (from 1) of every key and list item in it."""

    file: str
    data: Mapping[str, object]
    places: Mapping[KeyPath, tuple[int, int]]
    problems: tuple[Problem, ...] = ()

    def has(self, path: KeyPath) -> bool:
        """Whether the file says anything at `path`."""
        return path in self.places

    def line(self, path: KeyPath) -> int:
        """The line of `path`, or of the nearest key above it that the file has."""
        return self._place(path)[0]

    def problem(self, path: KeyPath, *, what: str, remedy: str) -> Problem:
        """A problem at `path`, with the value that the file has there."""
        line, column = self._place(path)
        value = value_text(self._value(path)) if path and self.has(path) else None
        return Problem(file=self.file, line=line, column=column, path=path, value=value, what=what, remedy=remedy)

    def _place(self, path: KeyPath) -> tuple[int, int]:
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def _value(self, path: KeyPath) -> object:
        value: object = self.data
        for part in path:
            value = value[part]  # type: ignore[index]  # `places` says that it is there
        return value


def read_source(path: Path) -> ConfigSource:
    """Reads `path`. Raises ConfigError where it cannot be read or is no YAML mapping; lesser faults are `problems`."""
    file = str(path)
    try:
        with path.open("rb") as stream:
            text = stream.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise _whole_file(file, what=f"has more than {_MOST_BYTES} bytes", remedy="name the topology's own file")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except OSError as error:
        raise _whole_file(file, what=f"cannot be read: {error.strerror}", remedy="name a file that exists") from error
    except yaml.YAMLError as error:
        raise _syntax_error(file, error) from error
    except RecursionError:
        raise _whole_file(
            file, what="is nested too deeply", remedy="write one mapping, as examples/local.yaml"
        ) from None
    if not isinstance(node, yaml.MappingNode):
        raise _whole_file(file, what="is no mapping", remedy="begin with `model:`, as examples/local.yaml does")
    reader = _Reader(file=file, loader=loader, places={(): (1, 1)})
    data = reader.mapping(node, path=(), inside=frozenset())
    return ConfigSource(file=file, data=data, places=reader.places, problems=tuple(reader.problems))


@dataclass(kw_only=True)
class _Reader:
    """Turns nodes into data; a node that it has to skip becomes a problem."""

    file: str
    loader: yaml.SafeLoader
    places: dict[KeyPath, tuple[int, int]]
    problems: list[Problem] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    num_repeated: int = 0

    def mapping(self, node: yaml.MappingNode, *, path: KeyPath, inside: frozenset[int]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path=path)
            if key is None:
                continue
            here = (*path, key)
            if here in self.places:
                first = self.places[here][0]
                self._fault(key_node, here, what=f"is given twice, first on line {first}", remedy="keep one of them")
                continue
            self.places[here] = _place(key_node)
            found[key] = self._value(value_node, path=here, inside=inside | {id(node)})
        return found

    def _value(self, node: yaml.Node, *, path: KeyPath, inside: frozenset[int]) -> object:
        if id(node) in inside:
            self._fault(node, path, what="is an alias of what it stands in", remedy="write the values out")
            return None
        if len(path) > _DEEPEST:
            self._fault(node, path, what="is nested too deeply", remedy="write it as examples/local.yaml")
            return None
        self._count(node)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path=path, inside=inside)
        if isinstance(node, yaml.SequenceNode):
            return self._items(node, path=path, inside=inside | {id(node)})
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path=path)

    def _count(self, node: yaml.Node) -> None:
        """Ends the reading where aliases of aliases would make many values of a few."""
        self.num_repeated += id(node) in self.seen
        self.seen.add(id(node))
        if self.num_repeated > _MOST_REPEATED:
            line, column = _place(node)
            raise _whole_file(
                self.file,
                what=f"aliases of this repeat more than {_MOST_REPEATED} values",
                remedy="write the values out",
                line=line,
                column=column,
            )

    def _items(self, node: yaml.SequenceNode, *, path: KeyPath, inside: frozenset[int]) -> list[object]:
        for index, item in enumerate(node.value):
            self.places[(*path, index)] = _place(item)
        return [self._value(item, path=(*path, index), inside=inside) for index, item in enumerate(node.value)]

    def _scalar(self, node: yaml.ScalarNode, *, path: KeyPath) -> object:
        try:
            value: object = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            remedy = "write plain text or a number"
            self._fault(node, path, what=f"cannot be read as {kind}", remedy=remedy, value=value_text(node.value))
            return None
        if value is None:
            self._fault(node, path, what="has no value", remedy=f"write one, or remove {key_text(path[-1:])}")
        elif (wrong := self._wrong(node, value)) is not None:
            what, remedy = wrong
            self._fault(node, path, what=what, remedy=remedy, value=plain_text(node.value))
            return None
        return value

    def _wrong(self, node: yaml.ScalarNode, value: object) -> tuple[str, str] | None:
        """What is wrong with a scalar that could be read, and the remedy."""
        if isinstance(value, str) and not _is_unicode(value):
            return "has half of a surrogate pair", "write the character itself"
        # A tag that is written out says what is meant, and so do quotes.
        implicit = self.loader.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
        is_plain = node.style is None and node.tag == implicit
        return surprise(node.value, value=value) if is_plain else None

    def _key(self, node: yaml.Node, *, path: KeyPath) -> str | None:
        if node.tag == _MERGE_TAG:
            self._fault(node, (*path, "<<"), what="merge keys are not read", remedy="write the keys out")
            return None
        if node.tag != "tag:yaml.org,2002:str" or not isinstance(node, yaml.ScalarNode):
            shown = plain_text(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            self._fault(node, path, what=f"{shown} is no text, as keys are", remedy="write the key's name, in quotes")
            return None
        shown = plain_text(node.value)
        if shown != node.value:  # it would stand in sentences
            self._fault(
                node, path, what=f"{shown} is too long for a key, or no plain text", remedy="write a key's name"
            )
            return None
        return shown

    def _fault(self, node: yaml.Node, path: KeyPath, *, what: str, remedy: str, value: str | None = None) -> None:
        line, column = _place(node)
        problem = Problem(file=self.file, line=line, column=column, path=path, value=value, what=what, remedy=remedy)
        self.problems.append(problem)


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole_file(file: str, *, what: str, remedy: str, line: int = 1, column: int = 1) -> ConfigError:
    problem = Problem(file=file, line=line, column=column, path=(), value=None, what=what, remedy=remedy)
    return ConfigError([problem])


def _syntax_error(file: str, error: yaml.YAMLError) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or " ".join(str(error).split())
    context = getattr(error, "context", None)
    return _whole_file(
        file,
        what=f"is no YAML: {text}{f' {context}' if context else ''}",
        remedy="mend the indentation, colons, quotes and brackets here",
        line=mark.line + 1 if mark else 1,
        column=mark.column + 1 if mark else 1,
    )

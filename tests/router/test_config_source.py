"""Reading YAML: what it would let pass in silence is told, with line and column."""

from itertools import pairwise
from pathlib import Path

import pytest

from router.config_source import ConfigSource, read_source
from router.problem import ConfigError, value_text


def source(folder: Path, text: str | bytes) -> ConfigSource:
    path = folder / "topo.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_source(path)


def faults(found: ConfigSource) -> list[str]:
    return [str(problem).removeprefix(f"{Path(problem.file).parent}/") for problem in found.problems]


def test_every_key_and_item_has_its_place(tmp_path: Path) -> None:
    found = source(tmp_path, "a: 1\nb:\n  - c: x\n  - {d: 2.5, e: [true]}\n")
    assert found.data == {"a": 1, "b": [{"c": "x"}, {"d": 2.5, "e": [True]}]}
    assert found.places[("b", 0, "c")] == (3, 5)
    assert found.places[("b", 1)] == (4, 5)
    assert found.places[("b", 1, "e", 0)] == (4, 18)
    assert found.problems == ()


def test_a_key_that_the_file_lacks_has_the_line_of_what_would_hold_it(tmp_path: Path) -> None:
    found = source(tmp_path, "a: 1\nb:\n  c: 2\n")
    assert found.line(("b", "x", "y")) == 2
    assert found.line(("z",)) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\na: 2\n", "topo.yaml:2: a: is given twice, first on line 1; keep one of them"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "topo.yaml:4: a.b: is given twice, first on line 2; keep one of them"),
        ("a:\n", "topo.yaml:1: a: has no value; write one, or remove a"),
        ("a: [1, ~]\n", "topo.yaml:1: a[1]: has no value; write one, or remove [1]"),
        ("1: x\n", "topo.yaml:1: 1 is no text, as keys are; write the key's name, in quotes"),
        ("a: 1\n[x]: 2\n", "topo.yaml:2: a list or mapping is no text, as keys are; write the key's name, in quotes"),
        ("a: {<<: {b: 1}}\n", "topo.yaml:1: a.<<: merge keys are not read; write the keys out"),
        ("a: &x [*x]\n", "topo.yaml:1: a[0]: is an alias of what it stands in; write the values out"),
        ("a: !!int no\n", "topo.yaml:1: a = 'no': cannot be read as int; write plain text or a number"),
        ("a: !what x\n", "topo.yaml:1: a = x: cannot be read as !what; write plain text or a number"),
        ('a: {"b\\nc": 1}\n', "topo.yaml:1: a: b c is too long for a key, or no plain text; write a key's name"),
        ('a: {"\\e[31m": 1}\n', "topo.yaml:1: a: ?[31m is too long for a key, or no plain text; write a key's name"),
        ('a: 1\n"\\ud800": 2\n', "topo.yaml:2: ? is too long for a key, or no plain text; write a key's name"),
        (
            f"a: {{{'k' * 500}: 1}}\n",
            f"topo.yaml:1: a: {'k' * 77}... is too long for a key, or no plain text; write a key's name",
        ),
        (
            f"? {'1' * 500}\n: 2\n",
            f"topo.yaml:1: {'1' * 77}... is no text, as keys are; write the key's name, in quotes",
        ),
    ],
)
def test_what_yaml_lets_pass_is_a_problem(tmp_path: Path, text: str, sentence: str) -> None:
    assert faults(source(tmp_path, text)) == [sentence]


def test_an_anchor_may_be_used_again(tmp_path: Path) -> None:
    found = source(tmp_path, "a: &x {b: 1}\nc: *x\n")
    assert found.data == {"a": {"b": 1}, "c": {"b": 1}}
    assert found.problems == ()


IN_DIGITS = "write the number in plain decimal digits, or put it in quotes"
TRUE_OR_FALSE = "write true or false, or put it in quotes"


@pytest.mark.parametrize(
    ("scalar", "read_as", "remedy"),
    [
        ("010", "8", IN_DIGITS),
        ("-017", "-15", IN_DIGITS),
        ("0x10", "16", IN_DIGITS),
        ("0b11", "3", IN_DIGITS),
        ("0o17", "text", IN_DIGITS),
        ("08", "text", IN_DIGITS),
        ("1_000", "1000", IN_DIGITS),
        ("1:04", "64", IN_DIGITS),
        ("1:04.5", "64.5", IN_DIGITS),
        ("1_0.5", "10.5", IN_DIGITS),
        ("01.5", "1.5", IN_DIGITS),
        ("1e3", "text", IN_DIGITS),
        ("yes", "true", TRUE_OR_FALSE),
        ("Off", "false", TRUE_OR_FALSE),
        ("2024-01-02", "a date", "put it in quotes, '2024-01-02'"),
        ("2024-01-02 03:04:05", "a datetime", "put it in quotes"),
    ],
)
def test_what_yaml_reads_as_something_else_is_a_problem_with_its_line(
    tmp_path: Path, scalar: str, read_as: str, remedy: str
) -> None:
    (found,) = faults(source(tmp_path, f"a: 1\nb:\n  - {scalar}\n"))
    assert found.startswith(f"topo.yaml:3: b[0] = {scalar}: is read as {read_as}; {remedy}")
    assert source(tmp_path, f"a: '{scalar}'\n").data == {"a": scalar}
    assert source(tmp_path, f"a: !!str {scalar}\n").problems == () or read_as == "text"


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("0", 0),
        ("-12", -12),
        ("+7", 7),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1.0e+3", 1000.0),
        (".inf", float("inf")),
        ("True", True),
        ("false", False),
        ("10.0.0.1", "10.0.0.1"),
        ("127.0.0.1:30000", "127.0.0.1:30000"),
        ("7b-instruct", "7b-instruct"),
        ("nan", "nan"),
        ("infinity", "infinity"),
    ],
)
def test_what_reads_as_it_looks_is_taken(tmp_path: Path, scalar: str, value: object) -> None:
    found = source(tmp_path, f"a: {scalar}\n")
    assert (found.data, found.problems) == ({"a": value}, ())


def test_half_of_a_surrogate_pair_is_a_problem(tmp_path: Path) -> None:
    (found,) = faults(source(tmp_path, 'a: "x\\ud800"\n'))
    assert found == "topo.yaml:1: a = x?: has half of a surrogate pair; write the character itself"


#: Each list has the one before nine times: 43 million values in three hundred bytes.
LAUGHS = "\n".join(f"{key}: &{key} [{','.join([f'*{before}'] * 9)}]" for before, key in pairwise("abcdefgh"))
ALIASES = {
    "aliases of aliases": f"a: &a [{','.join(['lol'] * 9)}]\n{LAUGHS}\n",
    "aliases of aliases in mappings": "a: &a {k: 1, l: 2}\n"
    + "\n".join(
        f"{key}: &{key} {{x: *{before}, y: *{before}, z: *{before}}}" for before, key in pairwise("abcdefghijklmn")
    )
    + "\n",
    "many aliases of one": "a: &a [" + "1," * 500 + "]\nb: [" + "*a," * 500 + "]\n",
    "aliases of what they stand in": "a: &a [&b [*a, *a], &c [*a, *b, *b], &d [*a, *b, *c, *c]]\n"
    + "b: ["
    + "*d, *c, *b," * 3000
    + "]\n",
}


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.timeout(10)
def test_aliases_that_make_many_values_of_few_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="aliases of this repeat more than 20000 values; write the values out"):
        source(tmp_path, ALIASES[name])


def test_a_file_that_is_far_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for path in (tmp_path / "large.yaml", Path("/dev/zero")):
        if path.parent == tmp_path:
            path.write_bytes(b"a: 1\n" * 300_000)
        with pytest.raises(ConfigError, match="has more than 1048576 bytes; name the topology's own file"):
            read_source(path)


@pytest.mark.parametrize("depth", [40, 300, 450, 5000])
def test_deep_nesting_is_told_at_whatever_depth(tmp_path: Path, depth: int) -> None:
    try:
        found = faults(source(tmp_path, "a: " + "[" * depth + "]" * depth))
    except ConfigError as error:
        found = [str(error)]
    assert len(found) == 1 and "is nested too deeply" in found[0]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: [1\n", 3, "is no YAML"),
        ("a: 1\n\tb: 2\n", 2, "is no YAML"),
        ("a: b: c\n", 1, "mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", 2, "is no YAML"),
        ("", 1, "is no mapping"),
        ("- a\n", 1, "is no mapping"),
        (b"\xff\xfe\xfa\x00", 1, "is no mapping"),
        ("a: " + "[" * 5000, 1, "nested too deeply"),
    ],
)
def test_what_is_no_yaml_mapping_ends_the_reading_at_its_line(
    tmp_path: Path, text: str | bytes, line: int, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        source(tmp_path, text)
    (problem,) = caught.value.problems
    assert problem.line == line
    assert words in str(problem)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError) as caught:
            read_source(path)
        assert str(caught.value).startswith(f"{path}:1: cannot be read")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2, "2"),
        ("2", "'2'"),
        ("yes", "'yes'"),
        (True, "true"),
        ("127.0.0.1:30000", "127.0.0.1:30000"),
        ({"ep": 2, "moe_dp": 1}, "{ep: 2, moe_dp: 1}"),
        ("a\nb", "'a b'"),
        ("x" * 100, "x" * 77 + "..."),
    ],
)
def test_values_are_shown_on_one_line_as_yaml(value: object, text: str) -> None:
    assert value_text(value) == text

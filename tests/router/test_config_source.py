"""Reading YAML: what it would let pass in silence is told, with line and column."""

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
    ],
)
def test_what_yaml_lets_pass_is_a_problem(tmp_path: Path, text: str, sentence: str) -> None:
    assert faults(source(tmp_path, text)) == [sentence]


def test_an_anchor_may_be_used_again(tmp_path: Path) -> None:
    found = source(tmp_path, "a: &x {b: 1}\nc: *x\n")
    assert found.data == {"a": {"b": 1}, "c": {"b": 1}}
    assert found.problems == ()


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

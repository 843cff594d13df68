"""A spread of layouts over every axis, in living processes: 60 in each test run, 600 in the full one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sweep.mutants import MUTANTS, Mutant, check_control, plant
from tests.sweep.pairs import Pair, parse_pair, spread
from tests.sweep.runs import Sweep, running_sweep

FAST, FULL = 60, 600


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    with running_sweep(tmp_path_factory.mktemp("sweep")) as running:
        yield running


def run(sweep: Sweep, pair: Pair) -> None:
    try:
        sweep.run(pair)
    except AssertionError as error:
        pytest.fail(f"{error}\nagain: python -m tests.sweep '{pair}'")


@pytest.mark.timeout(150)
@pytest.mark.parametrize("pair", spread(count=FAST), ids=str)
def test_a_layout_gives_the_tokens_of_transformers(sweep: Sweep, pair: Pair) -> None:
    run(sweep, pair)


@pytest.mark.full
@pytest.mark.timeout(150)
@pytest.mark.parametrize("pair", spread(count=FULL)[FAST:], ids=str)
def test_many_more_layouts_give_the_tokens_of_transformers(sweep: Sweep, pair: Pair) -> None:
    run(sweep, pair)


@pytest.mark.parametrize(
    "line", ["lama unified=1", "llama prefill=cp2", "llama unified=ep2", "llama unified=cp", "llama unified=1 page=8"]
)
def test_a_line_that_is_no_pair_says_so(line: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_pair(line)


def test_a_pair_is_read_back_from_its_line() -> None:
    for pair in spread(count=FULL):
        assert parse_pair(str(pair)) == pair


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_line_that_a_mutant_breaks_is_still_there(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)


def test_a_copy_of_the_tree_with_nothing_broken_passes() -> None:
    check_control(["llama unified=1"], num_layers=1)

"""A spread of layouts over every axis, in living processes: 64 in each test run, 600 in the full one."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sweep.mutants import MUTANTS, Mutant, check_control, plant
from tests.sweep.pairs import Pair, parse_pair, spread
from tests.sweep.runs import LENGTHS, Sweep, running_sweep

FAST, FULL = 64, 600


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


@pytest.mark.timeout(150)
@pytest.mark.parametrize("line", ["gpt_oss unified=cp2 pages=4.4", "glm4_moe prefill=cp2 decode=1"])
def test_the_second_wave_finds_its_prompts_in_the_prefix_cache(sweep: Sweep, line: str) -> None:
    pair = parse_pair(line)
    whole_pages = [(length - 1) // pair.pages[0] * pair.pages[0] for length in LENGTHS]
    assert sweep.run(pair) == 2 * sum(whole_pages)


def test_every_new_family_is_in_a_dozen_pairs_of_each_run_and_a_hundred_of_the_full_one() -> None:
    for count, least in ((FAST, 12), (FULL, 100)):
        families = Counter(pair.family.removesuffix("_wide") for pair in spread(count=count))
        assert families["gpt_oss"] >= least and families["glm4_moe"] >= least


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

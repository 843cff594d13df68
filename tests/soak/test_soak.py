"""Random requests with random ends leave nothing behind: capacity, memory, threads, files."""

from pathlib import Path

import pytest

from tests.harness.process_usage import Usage
from tests.soak.run import soak
from tests.soak.watch import Look, growth


@pytest.mark.timeout(240)
def test_a_few_hundred_requests_lose_no_page_and_end_as_they_should(tmp_path: Path) -> None:
    assert soak(650, folder=tmp_path) == []


@pytest.mark.full
@pytest.mark.timeout(900)
def test_thousands_of_requests_leave_every_process_as_it_was(tmp_path: Path) -> None:
    assert soak(6000, folder=tmp_path) == []


def test_whatever_has_grown_is_named_with_its_process_and_what_has_not_is_left_out() -> None:
    def at(requests: int, **rank: int) -> Look:
        held = {"resident_bytes": 100_000_000, "threads": 10, "files": 30}
        return Look(requests=requests, by_process={"router": Usage(**held), "rank 0": Usage(**{**held, **rank})})

    first = at(500)
    assert growth(first, at(900, resident_bytes=104_000_000, threads=13, files=33)) == []
    assert growth(first, at(900, resident_bytes=106_000_000)) == [
        "rank 0: resident 100.0 MB after 500, 106.0 MB after 900"
    ]
    assert growth(first, at(900, threads=14)) == ["rank 0: threads 10 after 500, 14 after 900"]
    assert growth(first, at(900, files=40)) == ["rank 0: files 30 after 500, 40 after 900"]

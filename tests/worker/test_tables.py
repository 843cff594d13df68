"""A rank's page tables: what is on the device is what is on the host."""

import random

import numpy as np
import pytest
import torch

from parallel.page_columns import PageColumns
from worker.step.tables import GroupTables


class OnDevice(torch.Tensor):
    """Memory that is not the host's, as far as it says."""

    is_cpu = False


def tables_with_a_device() -> GroupTables:
    """Tables of cp rank 0 of two, whose device has a memory of its own."""
    tables = GroupTables(
        num_slots=4, cp=2, cp_rank=0, page_size=4, spare_page=77, device=torch.device("cpu"), first_width=4
    )
    tables._on_device = tables._on_device.clone().as_subclass(OnDevice)
    return tables


@pytest.mark.parametrize("seed", range(20))
def test_the_device_has_every_own_page_that_the_host_has(seed: int) -> None:
    source, tables = random.Random(seed), tables_with_a_device()
    for _ in range(40):
        slots: list[int] = []
        for slot in source.sample(range(4), source.randint(1, 4)):
            if source.random() < 0.2:
                tables.clear(slot, first_page=source.randint(0, 3))
            slots += [slot] * source.randint(0, 20)
        numbers = [[source.randrange(limit) for _ in slots] for limit in (2, 1000)]
        cp_ranks, pages = (np.array(column, dtype=np.int32) for column in numbers)
        tables.append(np.array(slots, dtype=np.int64), PageColumns(cp_ranks=cp_ranks, pages=pages))
        on_device = tables.tables.device.as_subclass(torch.Tensor).numpy()
        assert np.array_equal(tables.tables.host, on_device)
        if tables.tables.device.is_cpu:  # they have grown, and are one memory here
            tables._on_device = tables._on_device.clone().as_subclass(OnDevice)

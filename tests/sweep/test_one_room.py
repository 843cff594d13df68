"""The layout of KV memory is written in parallel/storage.py alone: with another one there all the rest goes on."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweep.mutants import copy_tree, failure_of, replace_once

#: Position-major in place of head-major, and a page with bytes behind its planes that nobody reads.
CHANGES = {
    """        position_stride = plane.elements * itemsize
        heads = num_heads if plane.per_head else 1
""": """        heads = num_heads if plane.per_head else 1
        position_stride = heads * plane.elements * itemsize
""",
    "head_stride=page_size * position_stride,": "head_stride=plane.elements * itemsize,",
    "_aligned(offset + heads * page_size * position_stride)": "_aligned(offset + page_size * position_stride)",
    "page_bytes=offset, planes": "page_bytes=offset + 48, planes",
}
#: Each exchange, each side of a hand-off with more KV heads than the other, windows, other page sizes.
PAIRS = (
    "llama unified=cp2 exchange=ring",
    "llama prefill=cp2 decode=tp2 exchange=gather pages=8.4",
    "gpt_oss prefill=tp2 decode=cp2 pages=4.16",
    "gpt_oss_wide unified=cp2 exchange=pass_q",
    "glm4_moe prefill=pp2 decode=dp2 pages=16.8",
    "glm4_moe unified=cp3.moe_tp3 exchange=pass_q",
)
_LAYOUT = """
from parallel.storage import Plane, lay_out_page
page = lay_out_page([Plane(name="k", elements=3, per_head=True)], page_size=8, num_heads=2, dtype="float32")
print(page.page_bytes, page.planes[0].head_stride, page.planes[0].position_stride)
"""


def layout_in(folder: Path) -> str:
    """Bytes of a page of 8 positions of 2 heads of 3 float32, to the next head, to the next position."""
    command = [sys.executable, "-c", _LAYOUT]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.timeout(300)
def test_two_dimensions_of_a_plane_are_swapped_and_a_page_is_padded_in_one_file(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    assert layout_in(tmp_path) == "192 96 12\n"
    for before, after in CHANGES.items():
        replace_once(tmp_path / "parallel" / "storage.py", before=before, after=after)
    assert layout_in(tmp_path) == "240 12 24\n"
    assert not failure_of(tmp_path, *PAIRS)

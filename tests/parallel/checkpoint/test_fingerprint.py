"""Fingerprints tell checkpoints apart, by their values too, and are the same wherever a checkpoint lies."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from parallel.checkpoint.fingerprint import fingerprint
from parallel.checkpoint.sample_places import SAMPLE_BYTES, sample_places
from tests.tiny_models import llama, write_config, write_tensors, write_weights

VALUES = 200_000


def checkpoint(folder: Path, *, names: tuple[str, ...] = ("a", "b"), **changes: object) -> Path:
    write_config(folder, llama(**changes))
    write_weights(folder / "model.safetensors", names=list(names))
    return folder


def fine_tune(folder: Path, *, changed: Iterable[int] = ()) -> Path:
    """Three tensors; `changed` are the values of the middle one that differ from the base."""
    tensors = {name: np.arange(VALUES, dtype=np.float32) for name in "abc"}
    tensors["b"][list(changed)] += 1
    write_config(folder, llama())
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_fingerprint_is_the_same_wherever_the_folder_lies(tmp_path: Path) -> None:
    assert fingerprint(fine_tune(tmp_path / "here")) == fingerprint(fine_tune(tmp_path / "there"))


def test_a_fingerprint_differs_by_config_tensors_file_names_and_sizes(tmp_path: Path) -> None:
    folders = [
        checkpoint(tmp_path / "plain"),
        checkpoint(tmp_path / "config", rms_norm_eps=0.5),
        checkpoint(tmp_path / "tensors", names=("a", "c")),
        checkpoint(tmp_path / "name"),
        checkpoint(tmp_path / "size"),
    ]
    (folders[3] / "model.safetensors").rename(folders[3] / "other.safetensors")
    write_tensors(folders[4] / "model.safetensors", {"a": (1,), "b": (2,)})
    assert len({fingerprint(folder) for folder in folders}) == len(folders)


def test_fine_tunes_of_one_base_differ_though_their_headers_and_first_bytes_are_equal(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    changes: dict[str, Iterable[int]] = {
        "base": (),
        "its last values": range(VALUES - 2, VALUES),
        "its first value": [0],
        "3% in the middle": range(VALUES // 2, VALUES // 2 + VALUES * 3 // 100),
        "3% near the end": range(VALUES * 96 // 100, VALUES * 99 // 100),
        "2% all over": rng.choice(VALUES, VALUES // 50, replace=False),
        "one column of 64": range(17, VALUES, 64),
    }
    found = {name: fingerprint(fine_tune(tmp_path / name, changed=changed)) for name, changed in changes.items()}
    del found["its first value"], found["its last values"]  # too few to be seen: not of the promise
    assert len(set(found.values())) == len(found), found


def test_one_value_of_a_small_tensor_is_seen(tmp_path: Path) -> None:
    found = []
    for value in range(2):
        folder = write_config(tmp_path / str(value), llama())
        norm = np.ones(4096, dtype=np.float32)
        norm[2049] += value
        save_file({"norm": norm}, folder / "model.safetensors")
        found.append(fingerprint(folder))
    assert found[0] != found[1]


def test_of_many_tensors_each_is_seen_and_few_bytes_are_read(tmp_path: Path) -> None:
    """20,000 tensors of 64 kB, which take no room on disk: one whose values are all others changes the fingerprint."""
    folder = write_config(tmp_path, llama())
    write_tensors(folder / "model.safetensors", {f"t{index}": (16384,) for index in range(20_000)})
    before = fingerprint(folder)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-7 * 65536, 2)
        stream.write(b"\1" * 65536)
    assert fingerprint(folder) != before


@given(size=st.integers(0, 10**12), count=st.integers(1, 64))
def test_samples_lie_inside_the_tensor_apart_and_one_in_each_part_of_it(size: int, count: int) -> None:
    places = list(sample_places(size, count=count))
    assert sum(length for _, length in places) == min(size, count * SAMPLE_BYTES)
    ends = [start + length for start, length in places]
    assert ends[-1] <= size and places[0][0] >= 0
    assert all(end <= start for end, (start, _) in zip(ends, places[1:], strict=False))
    parts = [range(index * size // count, (index + 1) * size // count) for index in range(count)]
    assert len(places) == 1 or all(start in part for (start, _), part in zip(places, parts, strict=True))


def test_a_fingerprint_of_an_incomplete_download_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_config(tmp_path, llama())
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"one\.safetensors"):
        fingerprint(tmp_path)

"""Which file holds a tensor, and what is no weight file at all."""

import json
from pathlib import Path

import pytest

from parallel.checkpoint.safetensors_header import read_header
from parallel.checkpoint.weight_files import stored_entries, weight_files, weight_paths
from tests.tiny_models import write_tensors, write_weights


def test_tensors_of_single_files_are_found_by_their_headers(tmp_path: Path) -> None:
    write_weights(tmp_path / "one.safetensors", names=["a", "b"])
    write_weights(tmp_path / "two.safetensors", names=["c"])
    assert weight_files(tmp_path) == {
        "a": tmp_path / "one.safetensors",
        "b": tmp_path / "one.safetensors",
        "c": tmp_path / "two.safetensors",
    }


def test_an_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    write_weights(tmp_path / "one.safetensors", names=["a"])
    write_weights(tmp_path / "left-over.safetensors", names=["z"])
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(tmp_path) == {"a": tmp_path / "one.safetensors"}


def test_a_tensor_that_an_index_forgets_is_found_in_the_files_that_it_names(tmp_path: Path) -> None:
    write_weights(tmp_path / "one.safetensors", names=["a", "b"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert set(weight_files(tmp_path)) == set(stored_entries(tmp_path)) == {"a", "b"}


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file"):
        weight_files(tmp_path)


def test_an_index_without_a_weight_map_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        weight_files(tmp_path)


def test_one_whole_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", names=["a"])
    write_weights(tmp_path / "one.safetensors", names=["a"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert weight_files(tmp_path) == {"a": tmp_path / "model.safetensors"}


@pytest.mark.parametrize("indexed", [None, "one", "two"])
def test_a_tensor_in_two_files_is_an_error_whatever_an_index_says(tmp_path: Path, indexed: str | None) -> None:
    for name in ("one", "two"):
        write_weights(tmp_path / f"{name}.safetensors", names=["a", name])
    if indexed is not None:
        where = {"one": "one.safetensors", "two": "two.safetensors", "a": f"{indexed}.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=r"one\.safetensors and two\.safetensors both hold a; remove"):
        weight_files(tmp_path)


@pytest.mark.parametrize("weight_map", [[], {}, {"a": 1}, {"a": "../one.safetensors"}, {"a": None}])
def test_an_index_that_names_no_files_is_an_error(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        weight_paths(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "such as pytorch_model.bin; load it with transformers"),
        ("consolidated.00.pth", "save it with save_pretrained"),
        ("model.Q4_0.gguf", "such as model.Q4_0.gguf"),
        ("adapter_config.json", "holds an adapter"),
        ("README.md", "fetch the checkpoint anew"),
    ],
)
def test_weights_in_another_form_are_told_with_the_way_to_serve_them(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=words):
        weight_paths(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"<!DOCTYPE html><html>Not found</html>",
        (10**12).to_bytes(8, "little") + b"{}",
        *((len(json)).to_bytes(8, "little") + json for json in (b"no", b"{", b"{]", b"{" * 5000)),
    ],
)
def test_a_file_that_is_no_safetensors_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        weight_files(tmp_path)


def test_a_pointer_to_a_weight_file_is_told_as_one(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors is a git-lfs pointer, .*; run `git lfs pull`"):
        weight_files(tmp_path)


@pytest.mark.parametrize(("change", "words"), [(-1, "was cut short"), (+1, "is longer than it should be")])
def test_a_file_of_another_size_than_its_header_says_is_an_error(tmp_path: Path, change: int, words: str) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"a": (7,)})
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size + change)
    with pytest.raises(ValueError, match=f"{words}: its header names {size} bytes, it has {size + change}"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        7,
        {},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": 32, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    ],
)
def test_a_header_that_cannot_be_right_is_an_error_that_names_the_tensor(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"model\.safetensors has .*'a'.*; fetch the checkpoint anew"):
        stored_entries(tmp_path)


def test_a_folder_in_a_weight_files_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: Is a directory"):
        weight_files(tmp_path)


def test_a_header_is_read_without_the_weights(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one.safetensors", {"a": (1,), "b": ("BF16", (2, 3))})
    entries = read_header(tmp_path / "one.safetensors").entries
    assert {name: (entry.dtype, entry.shape, entry.end - entry.start) for name, entry in entries.items()} == {
        "a": ("F32", (1,), 4),
        "b": ("BF16", (2, 3), 12),
    }

"""Where a model's name leads, which file holds a tensor, and fingerprints that tell checkpoints apart."""

import json
from pathlib import Path

import pytest

from parallel.checkpoint import fingerprint, read_header, resolve_model, weight_files
from tests.tiny_models import llama, write_config, write_weights


def checkpoint(folder: Path, *, names: tuple[str, ...] = ("a", "b"), **changes: object) -> Path:
    write_config(folder, llama(**changes))
    write_weights(folder / "model.safetensors", names=list(names))
    return folder


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(checkpoint(tmp_path))) == tmp_path


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("model", ["nothing", "a/b/c", "/no/such", "./no/such", "~/none"])
def test_a_name_that_leads_nowhere_is_an_error(model: str) -> None:
    with pytest.raises(ValueError, match="neither 'demo', nor a folder that exists, nor a hub id"):
        resolve_model(model)


def test_a_name_that_the_hub_refuses_is_an_error() -> None:
    with pytest.raises(ValueError, match="the hub did not give it"):
        resolve_model("not an/id!")


def test_the_missing_demo_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run `make demo-model`"):
        resolve_model("demo")


def test_the_demo_is_found_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / ".cache/models/smollm2-135m-mixtral", llama())
    assert (resolve_model("demo") / "config.json").exists()


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


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file"):
        weight_files(tmp_path)


def test_an_index_without_a_weight_map_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"short", (10**12).to_bytes(8, "little") + b"{}", bytes([2, *[0] * 7]) + b"no"]
)
def test_a_file_that_is_no_safetensors_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        weight_files(tmp_path)


def test_a_header_is_read_without_the_weights(tmp_path: Path) -> None:
    write_weights(tmp_path / "one.safetensors", names=["a"])
    assert list(json.loads(read_header(tmp_path / "one.safetensors"))) == ["__metadata__", "a"]


def test_a_fingerprint_is_the_same_wherever_the_folder_lies(tmp_path: Path) -> None:
    assert fingerprint(checkpoint(tmp_path / "here")) == fingerprint(checkpoint(tmp_path / "there"))


def test_a_fingerprint_differs_by_config_tensors_file_names_and_sizes(tmp_path: Path) -> None:
    folders = [
        checkpoint(tmp_path / "plain"),
        checkpoint(tmp_path / "config", rms_norm_eps=0.5),
        checkpoint(tmp_path / "tensors", names=("a", "c")),
        checkpoint(tmp_path / "name"),
        checkpoint(tmp_path / "size"),
    ]
    (folders[3] / "model.safetensors").rename(folders[3] / "other.safetensors")
    with (folders[4] / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    assert len({fingerprint(folder) for folder in folders}) == len(folders)


def test_a_fingerprint_of_an_incomplete_download_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_config(tmp_path, llama())
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"one\.safetensors"):
        fingerprint(tmp_path)

"""Where a model's name leads."""

from pathlib import Path

import pytest

from parallel.checkpoint import location
from parallel.checkpoint.location import is_hub_id, resolve_model
from tests.tiny_models import llama, write_config, write_weights


def checkpoint(folder: Path) -> Path:
    write_config(folder, llama())
    write_weights(folder / "model.safetensors", names=["a", "b"])
    return folder


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(checkpoint(tmp_path))) == tmp_path


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("model", ["/no/such", "./no/such", "~/none", "/" + "a" * 300])
def test_a_path_that_leads_nowhere_is_an_error(model: str) -> None:
    with pytest.raises(ValueError, match=r"there is no folder|cannot be read: File name too long"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["nothing", "a/b/c"])
def test_a_name_that_leads_nowhere_is_an_error(model: str) -> None:
    with pytest.raises(ValueError, match="neither 'demo', nor a folder that exists, nor a hub id"):
        resolve_model(model)


def test_a_name_that_the_hub_refuses_is_an_error() -> None:
    with pytest.raises(ValueError, match="the hub did not give it"):
        resolve_model("not an/id!")


class TransferError(Exception):
    """What a transfer library raises: neither OSError nor ValueError."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TransferError("read timed out"), "read timed out"),
        (RuntimeError("of two\n\nlines"), "of two lines"),
        (OSError("no space\nleft"), "no space left"),
        (TransferError(), "TransferError"),
    ],
)
def test_whatever_a_transfer_from_the_hub_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fetch(model: str, *, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ValueError) as caught:
        resolve_model("owner/name")
    assert str(caught.value) == f"model 'owner/name' is no local folder, and the hub did not give it: {told}"


def test_the_missing_demo_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "DEMO_FOLDER", tmp_path / "none")
    with pytest.raises(ValueError, match="run `make demo-model` in a checkout"):
        resolve_model("demo")


def test_the_demo_is_found_in_the_checkout_whatever_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("demo") == Path(__file__).parents[3] / ".cache" / "models" / "smollm2-135m-mixtral"


def test_a_folder_with_an_adapter_alone_says_what_to_do_with_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter .*; merge it into its base"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(("model", "on_hub"), [("demo", False), ("owner/name", True), ("./a", False), ("a/b/c", False)])
def test_what_lies_on_the_hub_is_told_by_its_name(model: str, on_hub: bool) -> None:
    assert is_hub_id(model) == on_hub


def test_a_folder_that_is_named_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "owner/name")
    assert not is_hub_id("owner/name")

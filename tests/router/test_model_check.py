"""What is wrong with a model's files is one sentence with file and remedy, at `router check` and wherever it starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router.check import check_file
from router.cli import app
from router.errors import ClusterError
from router.model_check import check_model
from router.problem import ConfigError
from router.served_model import load_served_model
from tests import tiny_models
from tests.tiny_models import write_checkpoint, write_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000\n"
TOPOLOGY = "model: {model}\nhosts: [{{name: a, address: local, devices: 1}}]\npools: {{unified: {{}}}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", tiny_models.llama())


def topo(folder: Path) -> Path:
    path = folder.parent / "topo.yaml"
    path.write_text(TOPOLOGY.format(model=folder))
    return path


def problems(folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_file(topo(folder))
    return [str(problem).removeprefix(f"{topo(folder)}:1: model = ") for problem in caught.value.problems]


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def replace_by_folder(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def only_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def only_an_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


#: What is done to a sound checkpoint, and words of the one sentence that tells it.
BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no tokenizer": (remove("tokenizer.json"), ["has no tokenizer.json; fetch"]),
    "a tokenizer in another form": (
        only_sentencepiece,
        ["has no tokenizer.json, only tokenizer.model", "AutoTokenizer"],
    ),
    "weights in another form": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        ["holds no *.safetensors file", "pytorch_model.bin", "save_pretrained"],
    ),
    "a cut weight file": (write("model.safetensors", b"\0\0"), ["model.safetensors is no safetensors file", "fetch"]),
    "an empty index": (only_an_index, ["index.json has no weight_map"]),
    "quantised weights": (
        lambda folder: write_checkpoint(folder, tiny_models.llama(), **{"lm_head.weight": ("F8_E4M3", (50, 32))}),
        ["stores 1 tensor as F8_E4M3", "lm_head.weight in model.safetensors; serve the checkpoint"],
    ),
    "a scale that nobody reads": (
        lambda folder: write_checkpoint(folder, tiny_models.llama(), **{"lm_head.weight_scale_inv": (1, 1)}),
        ["holds 1 tensor that llama does not read: lm_head.weight_scale_inv in model.safetensors; where they are"],
    ),
    "a config of quantised weights": (
        lambda folder: write_config(folder, tiny_models.llama(quantization_config={"quant_method": "fp8"})),
        ["config.json has quantization_config (quant_method 'fp8'): of quantised", "; serve the checkpoint that"],
    ),
    "a tokenizer of another making": (
        write("tokenizer.json", '{"model": 3}'),
        ["the tokenizer of", "cannot be loaded"],
    ),
    "an empty tokenizer": (
        write("tokenizer.json", '{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}'),
        ["tokenizer.json has no tokens"],
    ),
    "a broken template": (
        write("chat_template.jinja", "{% for m in messages %}"),
        ["the chat template of", "broken: line 1", "correct it, or remove it"],
    ),
    "a template that is no text": (
        write("tokenizer_config.json", '{"chat_template": 7}'),
        ["chat template", "7, no text"],
    ),
    "a named template that is no text": (
        write("tokenizer_config.json", '{"chat_template": {"default": 7}}'),
        ["chat template", "7, no text"],
    ),
    "templates without a default": (
        write("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": "a"}]}'),
        ["the chat templates of", "('rag') have no 'default'", "; correct it, or remove it"],
    ),
    "a template that is no UTF-8": (write("chat_template.jinja", b"\xff\xfe"), ["chat_template.jinja is no UTF-8"]),
    "a template's pointer": (write("chat_template.jinja", POINTER), ["chat_template.jinja is a git-lfs pointer"]),
}
JSON_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
for _name in JSON_FILES:
    BROKEN |= {
        f"{_name} is a pointer": (write(_name, POINTER), [f"{_name} is a git-lfs pointer", "; run `git lfs pull`"]),
        f"{_name} is a page of HTML": (write(_name, "<!DOCTYPE html>"), [f"{_name} is not JSON", "; fetch"]),
        f"{_name} was cut short": (write(_name, '{"a": 1, '), [f"{_name} is not JSON", "; fetch"]),
        f"{_name} is empty": (write(_name, ""), [f"{_name} is not JSON", "; fetch"]),
        f"{_name} is a list": (write(_name, "[1]"), [f"{_name} holds no JSON object", "; fetch"]),
        f"{_name} is no UTF-8": (write(_name, b'{"a": "\xff"}'), [f"{_name} is no UTF-8", "; fetch"]),
        f"{_name} is nested without end": (write(_name, '{"a":' * 100_000), [f"{_name} is not JSON", "; fetch"]),
        f"{_name} is a folder": (replace_by_folder(_name), [f"{_name} cannot be read: Is a directory", "; fetch"]),
    }


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_sentence_at_the_check_and_at_the_start(name: str, folder: Path) -> None:
    change, words = BROKEN[name]
    change(folder)
    (found,) = problems(folder)
    assert all(word in found for word in words), found
    with pytest.raises(ClusterError) as caught:
        load_served_model(str(folder))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_sound_checkpoint_has_neither_faults_nor_warnings(folder: Path) -> None:
    found = check_model(folder, weights=True)
    assert (found.faults, found.warnings) == ((), ())
    assert load_served_model(str(folder)).description == found.description


def test_a_pointer_in_every_files_place_is_told_for_weights_tokenizer_and_defaults_at_once(folder: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        (folder / name).write_text(POINTER)
    found = problems(folder)
    assert len(found) == 3
    assert all("is a git-lfs pointer" in sentence for sentence in found)


def test_faults_of_the_model_are_told_beside_those_of_the_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    path = topo(folder)
    path.write_text(path.read_text().replace("unified: {}", "unified: {attention: {tp: 3}}"))
    with pytest.raises(ConfigError) as caught:
        check_file(path)
    assert {problem.key.partition(".")[0] for problem in caught.value.problems} == {"model", "pools"}


def test_the_check_prints_sentences_and_no_traceback(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"top_p": "high"}')
    result = CliRunner().invoke(app, ["check", "--config", str(topo(folder))])
    assert result.exit_code == 1
    assert "generation_config.json has top_p = 'high'; write a number" in result.stderr
    assert "Traceback" not in result.output


def test_a_warning_goes_to_standard_error_and_does_not_fail_the_check(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.1}')
    result = CliRunner().invoke(app, ["check", "--config", str(topo(folder))])
    assert result.exit_code == 0
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "generation_config.json has repetition_penalty = 1.1" in warning


@pytest.mark.parametrize(
    ("template", "is_told"),
    [
        ("{{ nothing() }}", True),
        ("{{ raise_exception('no chats') }}", True),
        ("{{ messages[0]['x']['y'] }}", True),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}w1", False),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}w1", False),
        ({"default": "w1", "rag": "{% broken"}, False),
    ],
)
def test_a_template_that_refuses_every_plain_chat_is_a_warning(folder: Path, template: object, is_told: bool) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    warnings = check_file(topo(folder)).warnings
    assert len(warnings) == is_told
    assert not is_told or "the model's chat template refuses it" in warnings[0]


def test_a_router_logs_the_models_warnings(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    load_served_model(str(folder))
    assert "num_beams = 4" in caplog.text


def test_a_layer_that_drafts_tokens_is_left_out_with_one_line_of_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = tiny_models.glm4_moe()
    load_served_model(str(write_checkpoint(tmp_path / "without", config)))
    assert not caplog.records
    drafts = {f"model.layers.4.{name}.weight": (2,) for name in ("eh_proj", "enorm")}
    folder = write_checkpoint(tmp_path / "with", config, **drafts)
    load_served_model(str(folder))
    assert caplog.messages == [f"layers that draft further tokens are not read: model={folder} layers=[4]"]


def test_of_a_hub_id_the_check_says_that_the_weights_were_not_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fetch(model: str, *, allow_patterns: list[str]) -> str:
        asked[model] = allow_patterns
        return str(folder)

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    path = folder.parent / "topo.yaml"
    path.write_text(TOPOLOGY.format(model="owner/name"))
    (warning,) = check_file(path).warnings
    assert warning.startswith("the weights of owner/name are on the hub and were not looked at")
    assert not any("safetensors" in pattern.removesuffix(".json") for pattern in asked["owner/name"])
    with pytest.raises(ClusterError, match=r"holds no \*.safetensors file"):
        load_served_model("owner/name")


@pytest.mark.parametrize("content", ["", "\n", json.dumps(POINTER)])
def test_a_tokenizer_config_of_no_object_never_ends_in_a_traceback(folder: Path, content: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    assert len(problems(folder)) == 1


@pytest.mark.parametrize("model", ["a" * 300, "a/" + "b" * 300, "./" + "a" * 5000])
def test_a_name_that_no_file_can_have_is_a_problem_of_its_line(tmp_path: Path, model: str) -> None:
    path = tmp_path / "topo.yaml"
    path.write_text(TOPOLOGY.format(model=model))
    with pytest.raises(ConfigError) as caught:
        check_file(path)
    assert [problem.key for problem in caught.value.problems] == ["model"]
    with pytest.raises(ClusterError, match="model "):
        load_served_model(model)


def plan(path: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of `router check`."""
    result = CliRunner().invoke(app, ["check", "--config", str(path), *options], env={"COLUMNS": "120"})
    return result.exit_code, result.output


@pytest.mark.parametrize("config", [tiny_models.llama(), tiny_models.gpt_oss(), tiny_models.mxfp4_gpt_oss()])
def test_a_plan_without_weights_is_that_of_the_whole_checkpoint(tmp_path: Path, config: dict[str, Any]) -> None:
    path = topo(write_checkpoint(tmp_path / "model", config))
    code, whole = plan(path)
    assert code == 0
    for file in (tmp_path / "model").iterdir():
        if file.name != "config.json":
            file.unlink()
    code, missing = plan(path)
    assert code == 1 and "weight" in missing and "tokenizer" in missing
    code, alone = plan(path, "--without-weights")
    told = f"warning: of {tmp_path / 'model'} only config.json was looked at: weights and tokenizer may have faults"
    assert code == 0 and told in alone
    assert alone.startswith(whole.partition("warning:")[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove("config.json"), "has no config.json"),
        (write("config.json", "{"), "config.json"),
        (write("config.json", json.dumps(tiny_models.llama(hidden_size=0))), "hidden_size = 0"),
        (write("config.json", json.dumps({"model_type": "gpt2"})), "model_type 'gpt2': the families that run are"),
    ],
)
def test_a_config_that_cannot_be_planned_is_told_without_weights_too(
    folder: Path, change: Callable[[Path], object], sentence: str
) -> None:
    change(folder)
    code, output = plan(topo(folder), "--without-weights")
    assert code == 1 and sentence in output and "remedy" not in output and "Traceback" not in output

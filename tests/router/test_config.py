"""The structure of topo.yaml: defaults, types, ranges, names of keys, and the schema."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel.models.registry import describe_checkpoint
from parallel.process.cores import available_cores
from router.check import check, check_file
from router.config import Config, EngineConfig, LimitsConfig, TimeoutsConfig, config_schema
from router.config_loading import load_config
from router.config_source import read_source
from router.problem import ConfigError
from router.resolve import expert_sizes, located
from tests.tiny_models import llama, mixtral, write_checkpoint, write_config

SMALLEST = """model: demo
hosts:
  - {address: local, devices: 1}
pools:
  unified: {}
"""


def load(folder: Path, text: str) -> Config:
    path = folder / "topo.yaml"
    path.write_text(text)
    return load_config(path)


def structure_problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def sense_problems(folder: Path, text: str, model: dict[str, Any]) -> list[str]:
    """The problems of `text` with `model` as its model, whatever it names."""
    path = folder / "topo.yaml"
    path.write_text(text)
    description = describe_checkpoint(write_config(folder / "model", model))
    with pytest.raises(ConfigError) as caught:
        check(load_config(path), source=read_source(path), description=description)
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    config = load(tmp_path, SMALLEST)
    assert config.listen == "127.0.0.1:30000"
    assert config.engine == EngineConfig(
        dtype="auto",
        page_size=16,
        max_batch_tokens=2048,
        max_sequences=64,
        kv_tokens=16384,
        step_timeout_s=60.0,
        attention_kernel="auto",
    )
    assert config.timeouts == TimeoutsConfig(start_s=600.0, heartbeat_s=10.0)
    assert config.limits == LimitsConfig(max_waiting=256, max_message_bytes=4194304)
    assert (config.hosts[0].label, config.hosts[0].device, config.hosts[0].device_indices) == ("local", "cpu", (0,))
    (pool,) = config.pools.named().values()
    assert (pool.replicas, pool.pp, pool.experts, pool.hosts) == (1, 1, None, None)


def test_devices_are_a_count_or_a_list(tmp_path: Path) -> None:
    assert load(tmp_path, SMALLEST.replace("devices: 1", "devices: 3")).hosts[0].device_indices == (0, 1, 2)
    assert load(tmp_path, SMALLEST.replace("devices: 1", "devices: [6, 2]")).hosts[0].device_indices == (6, 2)


def test_a_placement_in_the_file_is_that_of_every_layer(tmp_path: Path) -> None:
    text = SMALLEST.replace("unified: {}", "unified: {experts: {placement: [1, 0, 2]}}")
    (pool,) = load(tmp_path, text).pools.named().values()
    assert expert_sizes(pool).placements == ((1, 0, 2),)
    (pool,) = load(tmp_path, SMALLEST.replace("{}", "{experts: {ep: 1}}")).pools.named().values()
    assert expert_sizes(pool).placements == ()


@pytest.mark.parametrize("path", ["examples/local.yaml", "examples/unified.yaml"])
def test_the_examples_have_a_sound_structure(path: str) -> None:
    load_config(Path(path))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("model: demo\n", "", "topo.yaml:1: model: is missing; write text ('demo', a folder"),
        ("address: local, ", "", "topo.yaml:3: hosts[0].address: is missing; write text ('local': the router"),
        ("unified: {}", "unfied: {}", "topo.yaml:5: pools.unfied = {}: unknown key; did you mean unified? (legal: "),
        ("unified: {}", "unified: {qq: 1}", "topo.yaml:5: pools.unified.qq = 1: unknown key; remove it (legal: "),
        ("unified: {}", "unified: 3", "topo.yaml:5: pools.unified = 3: is no mapping; write a mapping of replicas"),
        ("devices: 1", "devices: '1'", "topo.yaml:3: hosts[0].devices = '1': is no whole number"),
        ("devices: 1", "devices: true", "topo.yaml:3: hosts[0].devices = true: is no whole number"),
        ("devices: 1", "devices: 0", "topo.yaml:3: hosts[0].devices = 0: is too small; write a whole number from 1"),
        ("devices: 1", "devices: []", "topo.yaml:3: hosts[0].devices = []: is empty"),
        ("devices: 1", "devices: [1, 0, 1]", "= [1, 0, 1]: names device 1 twice; name each device once"),
        ("devices: 1", "devices: [-1]", "topo.yaml:3: hosts[0].devices[0] = -1: is too small"),
        ("address: local", "address: here", "= here: has no port; write host:port"),
        ("address: local", "address: a:0", "= a:0: has port 0; write the port that the running `worker` listens on"),
        ("address: local", "address: 0.0.0.0:5", "= 0.0.0.0:5: stands for every interface; write the address"),
        ("model: demo", "model: ''", "topo.yaml:1: model = '': is empty; write text"),
        ("model: demo", "model: 7", "topo.yaml:1: model = 7: is no text; write text"),
        ("model: demo", "model: demo\nlisten: a:99999", "topo.yaml:2: listen = a:99999: has a port out of range"),
        ("model: demo", "model: demo\nengine: {dtype: bf16}", "did you mean bfloat16? write one of auto, float32"),
        ("model: demo", "model: demo\nengine: {page_size: 99999999999}", "= 99999999999: is too large"),
        ("model: demo", "model: demo\nengine: {step_timeout_s: 0}", "= 0: is too small; write a number above 0"),
        ("model: demo", "model: demo\ntimeouts: {start_s: .inf}", "= .inf: is no finite number"),
        ("model: demo", "model: demo\nlimits: {max_waiting: 1.5}", "= 1.5: is no whole number"),
        (
            "devices: 1",
            "devices: '4'",
            "write a whole number from 1 to 4096 or a list with one item or more, w",
        ),
        (
            "devices: 1",
            "devices: ['4']",
            "is no whole number; write a whole number from 0 to 4096, without quotes",
        ),
        ("unified: {}", "unified: {replicas: '4'}", "write a whole number from 1 to 4096, without quotes (complete"),
        (
            "model: demo",
            "model: demo\nengine: {prefix_cache: 'true'}",
            "is neither true nor false; write true or false, ",
        ),
        (
            "model: demo",
            "model: demo\nengine: {prefix_cache: 1}",
            "is neither true nor false; write true or false (",
        ),
        ("model: demo", "model: demo\nengine: {prefix_cache: off}", "= off: is read as false; write true or false"),
        (
            "model: demo",
            "model: demo\ntimeouts: {start_s: '1.5'}",
            "no number; write a number above 0, without quotes",
        ),
        (
            "model: demo",
            "model: demo\ntimeouts: {start_s: '5'}",
            "no number; write a number above 0, without quotes",
        ),
        ("model: demo", "model: 7", "= 7: is no text; write text, in quotes: '7' ('demo'"),
        ("model: demo", "model: true", "= true: is no text; write text, in quotes: 'true' ('demo'"),
        ("devices: 1", "devices: 010", "topo.yaml:3: hosts[0].devices = 010: is read as 8; write the number in plain"),
        ("unified: {}", "unified: {hosts: []}", "topo.yaml:5: pools.unified.hosts = []: is empty"),
    ],
)
def test_a_fault_of_structure_is_one_sentence(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in SMALLEST
    (found,) = structure_problems(tmp_path, SMALLEST.replace(old, new))
    assert sentence in found


@pytest.mark.parametrize("items", [["'1'"], ["-1", "1.5", "true"]])
def test_faults_without_number_are_told_as_far_as_anybody_reads(tmp_path: Path, items: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, SMALLEST.replace("devices: 1", f"devices: [{','.join(items * 2000)}]"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 101
    assert lines[-1] == "... and more: mend these first"


@pytest.mark.timeout(60)
def test_a_very_long_list_of_devices_is_counted_in_one_pass(tmp_path: Path) -> None:
    text = SMALLEST.replace("devices: 1", f"devices: [{','.join(['1'] * 60_000)}]")
    assert "names device 1 twice" in structure_problems(tmp_path, text)[0]


def test_faults_of_structure_come_together_and_before_those_of_sense(tmp_path: Path) -> None:
    text = SMALLEST.replace("model: demo", "model: demo\nmodel: x").replace("{}", "{pp: 0, replicas: 99, tp: 2}")
    found = structure_problems(tmp_path, text)
    assert [problem.split(":")[1] for problem in found] == ["2", "6", "6"]


@pytest.mark.parametrize(
    ("old", "new", "sentences"),
    [
        ("unified: {}", "unified: {attention: {tp: 3}}", ["tp 3 does not fit 8 query heads and 4 KV heads"]),
        ("unified: {}", "unified: {pp: 5}", ["pools.unified.pp = 5: the model has 4 layers", "pp from 1 to 4"]),
        ("unified: {}", "decode: {}", ["there is no prefill pool beside it; add pools.prefill"]),
        ("  unified: {}", "  {}", ["pools = {}: has no pool; write prefill and decode, or unified alone"]),
        ("unified: {}", "unified: {hosts: [local, local]}", ["pools.unified.hosts[1] = local: is named twice"]),
        ("unified: {}", "unified: {engine: {max_batch_tokens: 8}}", ["max_batch_tokens 8 is less than page_size 16"]),
        ("unified: {}", "unified: {engine: {page_size: 48}}", ["pools.unified.engine.page_size = 48", "16368"]),
        ("devices: 1}", "devices: 1}\n  - {address: local, devices: 1}", ["line 3 has this name too"]),
        (
            "devices: 1}",
            "devices: 1, device: cuda}\n  - {name: b, address: local, devices: [0], device: cuda}",
            ["hosts[1].devices = [0]: the host local has device 0 of this machine too"],
        ),
        (
            "devices: 1}",
            "devices: 1}\n  - {name: b, address: 'a:1', devices: 1, device: cuda}",
            ["pools.unified = {}: mixes kinds of device (local is cpu, b is cuda)", "pools.unified.hosts"],
        ),
        (
            "devices: 1}",
            "devices: 1}\n  - {name: b, address: 'localhost:30000', devices: 1}",
            ["hosts[1].address = localhost:30000: the router itself listens on this port"],
        ),
    ],
)
def test_a_fault_of_sense_is_told_with_its_remedy(tmp_path: Path, old: str, new: str, sentences: list[str]) -> None:
    assert old in SMALLEST
    found = sense_problems(tmp_path, SMALLEST.replace(old, new), llama())
    assert all(any(sentence in problem for problem in found) for sentence in sentences), found


def test_faults_that_need_no_model_are_told_beside_its_absence(tmp_path: Path) -> None:
    path = tmp_path / "topo.yaml"
    path.write_text(SMALLEST.replace("demo", "./nowhere").replace("{}", "{replicas: 2}"))
    with pytest.raises(ConfigError) as caught:
        check_file(path)
    assert [problem.key for problem in caught.value.problems] == ["model", "pools.unified"]


def test_a_dtype_that_does_not_run_must_be_replaced_on_cuda_only(tmp_path: Path) -> None:
    model = llama(dtype="float8_e4m3fn")
    text = SMALLEST.replace("devices: 1", "devices: 1, device: cuda")
    (found,) = sense_problems(tmp_path, text, model)
    assert "engine.dtype: the checkpoint's dtype float8_e4m3fn does not run; write one of float32" in found
    path = tmp_path / "topo.yaml"
    path.write_text(SMALLEST)
    description = describe_checkpoint(tmp_path / "model")
    topology = check(load_config(path), source=read_source(path), description=description)
    assert topology.replicas[0].engine.dtype == "float32"


@pytest.mark.parametrize("written", ["model", "./model", "../{name}/model", "other/../model", "{folder}/model"])
def test_a_relative_model_is_relative_to_its_file_and_launchers_get_it_absolute(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint(tmp_path / "model", llama())
    path = tmp_path / "topo.yaml"
    path.write_text(SMALLEST.replace("demo", written.format(name=tmp_path.name, folder=tmp_path)))
    monkeypatch.chdir("/")
    assert check_file(path).topology.model == check_file(path).config.model == str(model)
    monkeypatch.chdir(tmp_path)
    assert check_file(Path("topo.yaml")).topology.model == str(model)


def test_a_folder_of_the_current_folder_is_not_the_files_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path / "here" / "model", llama())
    path = tmp_path / "topo.yaml"
    path.write_text(SMALLEST.replace("demo", "./model"))
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match=f"there is no folder {tmp_path}/model"):
        check_file(path)


@pytest.mark.parametrize("model", ["demo", "owner/name", "x" * 300, '"a\\0b"'])
def test_a_name_is_no_path(model: str, tmp_path: Path) -> None:
    config = load(tmp_path, SMALLEST.replace("demo", model))
    (tmp_path / "demo").mkdir()
    assert located(config, folder=tmp_path).model == config.model


def test_auto_is_the_checkpoints_dtype_on_cuda(tmp_path: Path) -> None:
    path = tmp_path / "topo.yaml"
    path.write_text(SMALLEST.replace("devices: 1", "devices: 1, device: cuda"))
    description = describe_checkpoint(write_config(tmp_path / "model", mixtral()))
    topology = check(load_config(path), source=read_source(path), description=description)
    assert topology.replicas[0].engine.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("engine", "device", "held"),
    [
        ("", "cpu", "bfloat16"),
        ("engine: {weights: float32}\n", "cpu", "float32"),
        ("engine: {kernels: torch}\n", "cpu", "float32"),
        ("engine: {dtype: float16}\n", "cpu", "float16"),
        ("", "cuda", "bfloat16"),
    ],
)
def test_weights_are_held_as_the_checkpoint_has_them_where_kernels_widen_them(
    engine: str, device: str, held: str, tmp_path: Path
) -> None:
    path = tmp_path / "topo.yaml"
    path.write_text(SMALLEST.replace("devices: 1", f"devices: 1, device: {device}") + engine)
    description = describe_checkpoint(write_config(tmp_path / "model", mixtral()))
    topology = check(load_config(path), source=read_source(path), description=description)
    assert topology.replicas[0].engine.matrix_dtype == held


@pytest.mark.parametrize(("pool", "common"), [(", engine: {threads: 4097}", ""), ("", "engine: {threads: 0}\n")])
def test_threads_have_bounds(pool: str, common: str, tmp_path: Path) -> None:
    text = SMALLEST.replace("{}", f"{{pp: 1{pool}}}") + common
    (found,) = structure_problems(tmp_path, text)
    assert "engine.threads = " in found and "write a whole number from 1 to 4096" in found


@pytest.mark.parametrize("key", ["pools.unified.engine.threads", "engine.threads"])
def test_more_threads_than_this_machine_has_cores_are_refused_where_the_file_says_them(
    key: str, tmp_path: Path
) -> None:
    cores = available_cores()
    mapping = f"{{threads: {cores + 1}}}"
    text = SMALLEST.replace("{}", f"{{engine: {mapping}}}") if "pools" in key else f"{SMALLEST}engine: {mapping}\n"
    (found,) = sense_problems(tmp_path, text, llama())
    assert f"{key} = {cores + 1}: threads {cores + 1} are more than the {cores} cores there; write {cores} or" in found
    # What another machine has its launcher says.
    path = tmp_path / "topo.yaml"
    path.write_text(text.replace("address: local", "address: 'far:1'"))
    topology = check(load_config(path), source=read_source(path), description=describe_checkpoint(tmp_path / "model"))
    assert topology.replicas[0].num_threads == cores + 1


def test_prefill_and_decode_store_one_dtype(tmp_path: Path) -> None:
    text = SMALLEST.replace("devices: 1", "devices: 2").replace(
        "  unified: {}\n", "  prefill: {}\n  decode: {engine: {dtype: float16}}\n"
    )
    (found,) = sense_problems(tmp_path, text, llama())
    assert "topo.yaml:6: pools.decode.engine.dtype = float16: prefill stores float32 and decode float16" in found


def test_the_schema_describes_every_key() -> None:
    schema = config_schema()
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        assert part["description"]
        for name, key in part["properties"].items():
            assert key.get("description"), name


def test_the_router_checks_and_reports_without_torch() -> None:
    program = "import sys, router.cli, router.explain; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

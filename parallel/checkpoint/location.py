"""Where a model's name leads: the demo's folder, a local one, or the hub's cache."""

from pathlib import Path

DEMO = "demo"
# In the checkout that this code lies in, wherever a process was started.
DEMO_FOLDER = Path(__file__).absolute().parents[2] / ".cache" / "models" / "smollm2-135m-mixtral"
_SMALL = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]


def resolve_model(model: str, *, weights: bool = True) -> Path:
    """The local folder of `model`: `demo`, a folder, or a hub id, which is fetched to the hub's own cache.

    Without `weights` a hub's weight files are not fetched: a check needs the config alone. Raises ValueError where none
    of them leads to a checkpoint.
    """
    if model == DEMO:
        if not (DEMO_FOLDER / "config.json").exists():
            raise ValueError(f"the demo model is not in {DEMO_FOLDER}: run `make demo-model` in a checkout")
        return DEMO_FOLDER
    folder = Path(model)
    try:
        if (folder / "config.json").exists():
            return folder
        if folder.is_dir():
            raise ValueError(_without_config(folder))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from None
    if model.startswith(("/", ".", "~")):
        raise ValueError(f"there is no folder {model}")
    if not _looks_like_hub_id(model):
        raise ValueError(f"model {model!r} is neither 'demo', nor a folder that exists, nor a hub id (owner/name)")
    return _from_hub(model, patterns=[*_SMALL, *_WEIGHTS] if weights else _SMALL)


def is_hub_id(model: str) -> bool:
    """Whether `model` is fetched from the hub rather than found on this machine."""
    return model != "demo" and not Path(model).is_dir() and _looks_like_hub_id(model)


def _looks_like_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith(("/", ".", "~"))


def _without_config(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            f"{folder} holds an adapter (adapter_config.json), no whole model; "
            "merge it into its base with peft's merge_and_unload, and save that"
        )
    return f"{folder} has no config.json: a model is a folder with config.json and *.safetensors"


def _from_hub(model: str, *, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # whatever it transfers by raises kinds of its own, besides OSError and ValueError
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"model {model!r} is no local folder, and the hub did not give it: {told}") from error

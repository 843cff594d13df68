"""Whether a checkpoint's weight files hold what its description reads, and nothing else. Reads headers only.

A tensor that nobody reads is a fault: a quantised checkpoint's scales, a bias that the forward does not add. Served
without it, the model would answer, and wrongly.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from parallel.checkpoint.fault import Fault, few
from parallel.checkpoint.model_files import FETCH_ANEW
from parallel.checkpoint.safetensors_header import Header, StoredEntry, read_header
from parallel.checkpoint.weight_files import merge_entries, read_index, stored_entries, weight_paths
from parallel.models.description import ModelDescription
from parallel.models.file_tensors import PLAIN_FLOATS, FileTensor
from parallel.models.registry import describe_checkpoint

_UNQUANTISED = "serve the checkpoint that it was quantised from"
_LAYERS = "model.layers."
_MAX_FILE_FAULTS = 3
_MAX_DIGITS = 6  # of a layer's number


def require_sound(folder: Path) -> ModelDescription:
    """The description of the checkpoint in `folder`; ValueError with every fault of its config and weight files."""
    description = describe_checkpoint(folder)
    faults = find_faults(folder, description=description)
    if faults:
        raise ValueError("; ".join(map(str, faults)))
    return description


def find_faults(folder: Path, *, description: ModelDescription | None) -> list[Fault]:
    """Every fault of the weight files in `folder`; without a description, those of the files themselves."""
    try:
        index, paths = read_index(folder), weight_paths(folder)
    except ValueError as error:
        return [Fault.of(error, remedy=FETCH_ANEW)]
    headers, faults = _read_headers(paths)
    if faults:
        return faults
    try:
        entries = merge_entries(header.entries for header in headers.values())
    except ValueError as error:
        return [Fault.of(error, remedy=FETCH_ANEW)]
    found = list(_index_faults(index or {}, headers=headers, folder=folder))
    if description is not None:
        found += _entry_faults(entries, description=description, folder=folder)
    return found


def draft_layers(folder: Path, *, description: ModelDescription) -> tuple[int, ...]:
    """The layers after the last one that the weight files in `folder` hold, in a checkpoint without faults.

    They draft further tokens (multi-token prediction, arXiv 2412.19437), and are not read.
    """
    layers = {_layer_of(name) for name in stored_entries(folder)}
    return tuple(sorted(layer for layer in layers if layer is not None and layer >= description.num_layers))


def _read_headers(paths: Iterable[Path]) -> tuple[dict[Path, Header], list[Fault]]:
    """The headers of all files, or what is wrong with the first of those that have none."""
    headers: dict[Path, Header] = {}
    faults: list[Fault] = []
    for path in paths:
        try:
            headers[path] = read_header(path)
        except ValueError as error:
            faults.append(Fault.of(error, remedy=FETCH_ANEW))
    rest = len(faults) - _MAX_FILE_FAULTS
    if rest > 0:
        more = Fault(what=f"{rest} more of its weight files cannot be read", remedy=FETCH_ANEW)
        faults = [*faults[:_MAX_FILE_FAULTS], more]
    return headers, faults


def _index_faults(index: Mapping[str, Path], *, headers: Mapping[Path, Header], folder: Path) -> Iterator[Fault]:
    lacking = [f"{name} in {path.name}" for name, path in index.items() if name not in headers[path].entries]
    if lacking:
        yield Fault(
            what=f"the index of {folder} names {_count(lacking, 'tensor')} that the file does not hold: {few(lacking)}",
            remedy=FETCH_ANEW,
        )


def _entry_faults(
    entries: Mapping[str, StoredEntry], *, description: ModelDescription, folder: Path
) -> Iterator[Fault]:
    wanted = {tensor.name: tensor for spec in description.tensors for tensor in spec.in_files}
    missing = [name for name in wanted if name not in entries]
    if missing:
        yield Fault(
            what=f"{folder} lacks {_count(missing, 'tensor')} that its config.json calls for: {few(missing)}",
            remedy=f"{FETCH_ANEW}, or correct config.json",
        )
    left = [
        f"{name} in {entry.file.name}"
        for name, entry in entries.items()
        if name not in wanted and not _is_harmless(name, description=description)
    ]
    if left:
        yield Fault(
            what=f"{folder} holds {_count(left, 'tensor')} that {description.family} does not read: {few(left)}",
            remedy=f"where they are scales, {_UNQUANTISED}; else one whose config.json and weights belong together",
        )
    found = [(tensor, entries[name]) for name, tensor in wanted.items() if name in entries]
    yield from _dtype_faults(found, folder=folder)
    others = [
        f"{tensor.name} in {entry.file.name} is {entry.shape}, config.json asks for {tensor.shape}"
        for tensor, entry in found
        if entry.shape != tensor.shape
    ]
    if others:
        yield Fault(
            what=f"{folder} holds {_count(others, 'tensor')} of another shape: {few(others)}",
            remedy="serve a checkpoint whose config.json and weights belong together",
        )


def _dtype_faults(found: Iterable[tuple[FileTensor, StoredEntry]], *, folder: Path) -> Iterator[Fault]:
    by_dtype: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for tensor, entry in found:
        if entry.dtype not in tensor.dtypes:
            by_dtype.setdefault((entry.dtype, tensor.dtypes), []).append(f"{tensor.name} in {entry.file.name}")
    for (dtype, wanted), names in by_dtype.items():
        why = "no plain float" if wanted == PLAIN_FLOATS else f"not {', '.join(wanted)}"
        yield Fault(
            what=f"{folder} stores {_count(names, 'tensor')} as {dtype}, which is {why}: {few(names)}",
            remedy=f"{_UNQUANTISED} ({', '.join(wanted)} are read)",
        )


def _is_harmless(name: str, *, description: ModelDescription) -> bool:
    """What a checkpoint may hold beside its tensors: nothing of it changes the model's tokens.

    Inverse frequencies are computed from the config; the output of a tied model is its embedding (one that differs is
    in the description); layers after the last are those that draft further tokens.
    """
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight":
        return description.tied_embeddings
    layer, first = _layer_of(name), description.num_layers
    return layer is not None and first <= layer < first + description.num_nextn_predict_layers


def _layer_of(name: str) -> int | None:
    """The number of the layer that a tensor's name puts it in."""
    number = name.removeprefix(_LAYERS).partition(".")[0]
    is_layer = name.startswith(_LAYERS) and number.isdecimal() and len(number) <= _MAX_DIGITS
    return int(number) if is_layer else None


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"

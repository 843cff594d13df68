"""Chooses the kernels of a rank: the one place that does."""

import logging

import torch

from native.build import Build
from native.library import NativeLibrary
from parallel.kernels import why_not_native
from worker.kernels.interface import Kernels
from worker.kernels.native_kernels import NativeKernels
from worker.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__)


def choose_library(
    asked: str, *, device: torch.device, dtype: str, loaded: NativeLibrary | None = None
) -> NativeLibrary | None:
    """The library of native kernels where `asked` (auto, torch, native) means them on `device`, for numbers of `dtype`.

    Builds nothing: that is the launcher's part. One that is `loaded` already is not looked for again. ValueError where
    native ones are asked for and cannot be had.
    """
    if asked == "torch":
        return None
    reason = why_not_native(device=device.type, dtype=dtype)
    library = loaded if reason is None else None
    if reason is None and library is None:
        library, reason = _load()
    if library is not None:
        logger.info("kernels: native, vectors of %d floats, threads=%d", library.lanes(), library.num_threads)
    elif asked == "native":
        raise ValueError(f"engine.kernels is native, but {reason}")
    elif device.type == "cpu":
        logger.warning("kernels: torch's, for %s", reason)
    return library


def load_library() -> NativeLibrary:
    """The library that this machine's launcher has built; ValueError where it cannot be had after all."""
    library, reason = _load()
    if library is None:
        raise ValueError(f"the groups of this replica share memory, but native kernels cannot be had: {reason}")
    return library


def make_kernels(library: NativeLibrary | None) -> Kernels:
    """Native kernels where there is a library, else torch's."""
    return TorchKernels() if library is None else NativeKernels(library)


def _load() -> tuple[NativeLibrary | None, str | None]:
    path = Build().find()
    if path is None:
        return None, "they are not built for this machine: `python -m native.build` says why"
    try:
        return NativeLibrary(path, num_threads=torch.get_num_threads()), None
    except OSError as error:
        return None, f"{path} cannot be loaded: {error}"

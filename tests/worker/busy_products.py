"""`python -m tests.worker.busy_products KERNELS STEPS`: products on a busy machine.

The stand-still that was once seen: a process on two OpenMP threads, its weights packed by one thread and stepped by
another, sat in a product of oneDNN for ten minutes while other processes had the cores. Prints `done`.
"""

import os
import sys
import threading
from multiprocessing import Process

import torch

from native.build import Build
from native.library import NativeLibrary
from parallel.models.gates import SWIGLU
from worker.kernels.interface import Kernels, Norm
from worker.kernels.native_kernels import NativeKernels
from worker.kernels.torch_kernels import TorchKernels

HIDDEN, INNER, LAYERS = 576, 1536, 4
#: New ones in turn: oneDNN compiles for each, on whichever thread meets it first.
ROWS = (1, 4, 8, 33, 128, 2, 16)


class Model:
    """A few layers of a feed-forward model, whose rows keep their size."""

    def __init__(self, kernels: Kernels) -> None:
        make = torch.Generator().manual_seed(0)

        def weight(out: int, size: int) -> torch.Tensor:
            return torch.randn(out, size, generator=make).mul_(size**-0.5)

        norm = Norm(weight=torch.ones(HIDDEN), eps=1e-6)
        self._layers = [
            (
                kernels.gated(weight(INNER, HIDDEN), weight(INNER, HIDDEN), activation=SWIGLU, norm=norm),
                kernels.linear([weight(HIDDEN, INNER)]),
            )
            for _ in range(LAYERS)
        ]

    def step(self, num_rows: int) -> torch.Tensor:
        """The rows after all layers: the same for the same number of rows."""
        x = torch.linspace(-1, 1, num_rows * HIDDEN).view(num_rows, HIDDEN)
        for gated, down in self._layers:
            x = x + down(gated(x))
        return x


def make_kernels(name: str, num_threads: int) -> Kernels:
    """By name, torch or native."""
    path = Build().find()
    assert path is not None, "built before"
    return TorchKernels() if name == "torch" else NativeKernels(NativeLibrary(path, num_threads=num_threads))


def burn(parent: int) -> None:
    """Keeps a core busy until it is ended, or its parent has been."""
    while os.getppid() == parent:
        pass


def main() -> None:
    name, steps = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(2)
    burners = [Process(target=burn, args=(os.getpid(),), daemon=True) for _ in range(4)]
    for burner in burners:
        burner.start()
    models: list[Model] = []
    packing = threading.Thread(target=lambda: models.append(Model(make_kernels(name, 2))))
    packing.start()
    packing.join()
    wanted = {num_rows: models[0].step(num_rows) for num_rows in ROWS}  # the main thread's team
    failures: list[str] = []

    def step_all(offset: int) -> None:
        for index in range(steps):
            num_rows = ROWS[(index + offset) % len(ROWS)]
            if not torch.allclose(models[0].step(num_rows), wanted[num_rows], atol=1e-5):
                failures.append(f"step {index} of {num_rows} rows differs")

    stepping = [threading.Thread(target=step_all, args=(offset,)) for offset in (0, 3)]
    for thread in stepping:
        thread.start()
    for thread in stepping:
        thread.join()
    step_all(1)
    print("\n".join(failures) or "done")


if __name__ == "__main__":
    main()

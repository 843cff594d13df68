"""Builds the library of `src/` for this machine and finds it again: `python -m native.build`.

A library is named by what it depends on: the sources, the flags and the processor's features (native code of another
processor ends with SIGILL), and the compiler. It is compiled beside its name and renamed, under a lock, so whoever
starts together builds once, and nobody ever loads a part of one.
"""

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-Wall", "-Wextra")
#: What vectors are made of: all that this processor has, or what every x86-64 of the last ten years has.
NATIVE, AVX2 = "native", "x86-64-v3"


class BuildError(Exception):
    """The library could not be built; the message is a sentence with what was tried."""


def default_folders() -> tuple[Path, ...]:
    """Where libraries lie: in the package, or in the user's cache where that is read-only."""
    package, cache = _PACKAGE / "built", os.environ.get("XDG_CACHE_HOME")
    try:
        return package, (Path(cache) if cache else Path.home() / ".cache") / "muster" / "native"
    except RuntimeError:  # nobody's home
        return (package,)


@dataclass(frozen=True, kw_only=True)
class Build:
    """One way to build: the files of `sources` for `march`, with `extra` flags (a sanitizer's), into the first of
    `folders` that can be written.
    """

    march: str = NATIVE
    extra: tuple[str, ...] = ()
    sources: Path = _PACKAGE / "src"
    folders: tuple[Path, ...] = field(default_factory=default_folders)

    def find(self) -> Path | None:
        """The library, where it has been built; where the compiler has gone since, one by another."""
        key = self._key()
        compiler = _compiler()
        pattern = f"{key}-{_version_hash(compiler)}.so" if compiler else f"{key}-*.so"
        for folder in self.folders:
            found = sorted(folder.glob(pattern))
            if found:
                return found[-1]
        return None

    def make(self) -> Path:
        """The library, built now where it was not. BuildError where that fails, whatever it is that does."""
        try:
            return self._make()
        except OSError as error:
            raise BuildError(f"{error.filename or 'the library'}: {error.strerror or error}") from error

    def _make(self) -> Path:
        found = self.find()
        if found is not None:
            return found
        compiler = _compiler()
        if compiler is None:
            raise BuildError(f"no C++ compiler: {_missing()}; install one (GCC 12 or newer; Debian: g++) or set CXX")
        folder = self._writable_folder()
        target = folder / f"{self._key()}-{_version_hash(compiler)}.so"
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                self._compile(compiler, target)
        return target

    def _compile(self, compiler: Sequence[str], target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as scratch:
            built = Path(scratch) / "library.so"
            sources = [str(path) for path in self._files() if path.suffix == ".cpp"]
            command = [*compiler, *self._flags(), *sources, "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = "\n".join(done.stderr.splitlines()[:20])
                name = " ".join(compiler)
                asked = "(asked for are x86-64 with AVX2, and GCC 12 or newer or Clang)"
                raise BuildError(f"{name} failed with exit status {done.returncode}:\n{said}\n{asked}")
            built.rename(target)

    def _flags(self) -> Sequence[str]:
        return (*_FLAGS, f"-march={self.march}", *self.extra)

    def _files(self) -> list[Path]:
        return sorted(self.sources.iterdir())

    def _writable_folder(self) -> Path:
        refused = []
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                refused.append(f"{folder}: {error.strerror}")
                continue
            if os.access(folder, os.W_OK):
                return folder
            refused.append(f"{folder}: not writable")
        raise BuildError(f"no folder to build in: {'; '.join(refused)}; set XDG_CACHE_HOME to one that can be written")

    def _key(self) -> str:
        digest = hashlib.sha256()
        for path in self._files():
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        digest.update("\0".join([*self._flags(), _processor()]).encode())
        return digest.hexdigest()[:20]


def _compiler() -> Sequence[str] | None:
    """The command that compiles: what CXX says, which may be several words, else the first that there is."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for program, *words in [asked] if asked else [[name] for name in _COMPILERS]:
        found = shutil.which(program)
        if found:
            return (found, *words)
    return None


def _missing() -> str:
    asked = os.environ.get("CXX")
    return f"CXX is {asked}, which is not in PATH" if asked else f"none of {', '.join(_COMPILERS)} is in PATH"


def _version_hash(compiler: Sequence[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    return hashlib.sha256(" ".join(compiler).encode() + version).hexdigest()[:12]


def _processor() -> str:
    """What code for `-march=native` may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features")
    return platform.machine() + "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Builds, and says where it lies; without a compiler a warning is all, for everything runs without."""
    try:
        print(Build().make())
    except BuildError as error:
        print(f"warning: no native kernels, torch's are used instead: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()

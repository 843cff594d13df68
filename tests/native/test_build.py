"""The native library: built once whoever starts together, found again, and missed with a sentence."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from native.build import Build, BuildError

SOURCE = 'extern "C" { int muster_lanes() { return 3; } }\n'


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Of a library that compiles in no time."""
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "one.cpp").write_text(SOURCE)
    return Build(sources=sources, folders=(tmp_path / "built",))


def test_processes_that_start_together_build_once_and_all_find_it(build: Build) -> None:
    program = (
        "import sys; from pathlib import Path; from native.build import Build;"
        "print(Build(sources=Path(sys.argv[1]), folders=(Path(sys.argv[2]),)).make())"
    )
    command = [sys.executable, "-c", program, str(build.sources), str(build.folders[0])]

    def run(_: int) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(run, range(4)))
    assert found == {str(build.find())}
    assert [path.suffix for path in sorted(build.folders[0].iterdir())] == [".lock", ".so"]


def test_a_library_of_other_sources_or_flags_is_not_taken(build: Build) -> None:
    made = build.make()
    assert build.make() == made
    assert Build(sources=build.sources, folders=build.folders, extra=("-O1",)).find() is None
    (build.sources / "one.cpp").write_text(SOURCE + "// changed\n")
    assert build.find() is None
    assert build.make() != made


def test_without_a_compiler_a_built_library_is_found_and_none_is_built(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = build.make()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find() == made
    made.unlink()
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: none of c\+\+, g\+\+, clang\+\+ is in PATH"):
        build.make()


def test_what_the_compiler_says_is_in_the_error(build: Build) -> None:
    (build.sources / "one.cpp").write_text("nonsense;\n")
    with pytest.raises(BuildError, match=r"exit status 1:(?s:.*)nonsense"):
        build.make()
    assert build.find() is None


def test_where_the_first_folder_cannot_be_made_the_next_one_is_used(build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    second = Build(sources=build.sources, folders=(tmp_path / "file" / "built", tmp_path / "cache"))
    assert second.make().parent == tmp_path / "cache"
    assert second.find() is not None
    nowhere = Build(sources=build.sources, folders=(tmp_path / "file" / "built",))
    with pytest.raises(BuildError, match=r"no folder to build in: .*Not a directory"):
        nowhere.make()


def test_the_command_warns_without_a_compiler_and_says_where_the_library_is_with_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "native.build"]
    nothing = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    # Another processor's features are as good as no library: what was built here has to be left alone.
    program = "import sys, native.build as b; b._processor = lambda: 'another'; b.main()"
    done = subprocess.run([sys.executable, "-c", program], env=nothing, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(
        "warning: no native kernels, torch's are used instead: no C++ compiler: CXX is no-such-compiler"
    )
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == Build().find()


def test_a_compiler_of_several_words_is_one_and_one_that_is_not_there_is_named(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "env -i PATH=/usr/bin g++ -O0")
    assert build.make().exists()
    monkeypatch.setenv("CXX", "no-such-compiler -O0")
    (build.sources / "one.cpp").write_text(SOURCE + "// changed\n")
    with pytest.raises(BuildError, match="CXX is no-such-compiler -O0, which is not in PATH"):
        build.make()


def test_a_folder_that_cannot_be_used_after_all_is_a_sentence(build: Build) -> None:
    build.folders[0].mkdir()
    name = f"{build.make().stem}.lock"
    build.make().unlink()
    (build.folders[0] / name).unlink()
    (build.folders[0] / name).mkdir()
    with pytest.raises(BuildError, match=rf"{name}: Is a directory"):
        build.make()

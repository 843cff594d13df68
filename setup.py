"""What pyproject.toml cannot say: the messages are generated as the package is built.

`python setup.py generate_protos` writes them beside their sources, as an editable install does; a wheel gets its own.
"""

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_py import build_py

_ROOT = Path(__file__).absolute().parent


class GenerateProtos(Command):
    """Generates the modules of every .proto file into `output`, by default the source tree."""

    description = "generate the modules of the protocol buffers"
    user_options = [("output=", "o", "folder that gets proto/*_pb2*.py")]  # noqa: RUF012 - as setuptools has it

    def initialize_options(self) -> None:
        self.output = str(_ROOT)

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        from grpc_tools import protoc

        outputs = [f"--{kind}_out={self.output}" for kind in ("python", "pyi", "grpc_python")]
        sources = sorted(map(str, (_ROOT / "proto").glob("*.proto")))
        # The root is the include path, so that `import "proto/x.proto"` becomes `from proto import x_pb2`.
        if protoc.main(["protoc", f"-I{_ROOT}", *outputs, *sources]) != 0:
            raise SystemExit("protoc failed; its messages are above")


class BuildPy(build_py):
    """Packages and the generated modules."""

    def run(self) -> None:
        super().run()
        generate = self.get_finalized_command("generate_protos")
        generate.output = str(_ROOT) if self.editable_mode else self.build_lib
        generate.run()


setup(cmdclass={"generate_protos": GenerateProtos, "build_py": BuildPy})

"""The command `worker`: runs a host's launcher."""

import sys
from typing import Annotated

import typer
import uvloop

from parallel.process.address import Address, parse_address
from parallel.process.listening import ListenError
from parallel.process.logs import LogLevel, start_logging
from worker.launcher.server import LauncherOptions, run_launcher

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def worker(
    listen: Annotated[str, typer.Option(help="HOST:PORT to serve on; port 0 lets the system choose.")],
    insecure: Annotated[bool, typer.Option(help="Allow an address beyond loopback without TLS.")] = False,
    mock: Annotated[bool, typer.Option(help="Ranks without torch that answer deterministic tokens.")] = False,
    mock_step_s: Annotated[float, typer.Option(min=0, max=3600, help="Seconds that a mocked step takes.")] = 0.0,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="CPU threads of each rank; unset shares the cores.")
    ] = None,
    exit_with_stdin: Annotated[bool, typer.Option(hidden=True)] = False,
    log_level: Annotated[LogLevel, typer.Option(case_sensitive=False, help="What is logged.")] = LogLevel.INFO,
) -> None:
    """Serves this host's devices to a router. Prints its address when it is ready; ends with SIGINT or SIGTERM."""
    address = _parse_listen(listen, insecure=insecure)
    start_logging(log_level)
    options = LauncherOptions(
        listen=address,
        mock=mock,
        mock_step_s=mock_step_s,
        num_threads=threads,
        exit_with_stdin=exit_with_stdin,
        log_level=log_level,
    )
    try:
        uvloop.run(run_launcher(options))
    except ListenError as error:
        print(f"worker: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _parse_listen(listen: str, *, insecure: bool) -> Address:
    try:
        address = parse_address(listen)
    except ValueError as error:
        raise typer.BadParameter(f"--listen {listen} {error}") from None
    if not address.is_loopback and not insecure:
        raise typer.BadParameter(
            f"--listen {listen} is beyond loopback and the connection is not encrypted: add --insecure on a network "
            "that you trust, or listen on 127.0.0.1"
        )
    return address

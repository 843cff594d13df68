"""The command `worker`: runs a host's launcher."""

import ipaddress
import logging
from typing import Annotated

import typer
import uvloop

from worker.launcher.server import LauncherOptions, run_launcher

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def worker(
    listen: Annotated[str, typer.Option(help="HOST:PORT to serve on; port 0 lets the system choose.")],
    insecure: Annotated[bool, typer.Option(help="Allow an address beyond loopback without TLS.")] = False,
    mock: Annotated[bool, typer.Option(help="Ranks without torch that answer deterministic tokens.")] = False,
    mock_step_s: Annotated[float, typer.Option(help="Seconds that a mocked step takes.")] = 0.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each rank; unset shares the cores.")] = None,
    exit_with_stdin: Annotated[bool, typer.Option(hidden=True)] = False,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Serves this host's devices to a router. Prints its address when it is ready; ends with SIGINT or SIGTERM."""
    host, port = _parse_listen(listen, insecure=insecure)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    options = LauncherOptions(
        host=host,
        port=port,
        mock=mock,
        mock_step_s=mock_step_s,
        num_threads=threads,
        exit_with_stdin=exit_with_stdin,
        log_level=log_level,
    )
    uvloop.run(run_launcher(options))


def _parse_listen(listen: str, *, insecure: bool) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter(f"--listen {listen}: it must be HOST:PORT with a port of 0 to 65535")
    host = host.strip("[]")
    loopback = host == "localhost" or _is_loopback(host)
    if not loopback and not insecure:
        raise typer.BadParameter(
            f"--listen {listen} is beyond loopback and the connection is not encrypted: add --insecure on a network "
            "that you trust, or listen on 127.0.0.1"
        )
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""The command `router`: serves a topology, checks one, prints its schema, and talks to a running router."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from parallel.process.address import parse_address
from parallel.process.logs import LogLevel, start_logging
from proto import inference_pb2
from router.check import CheckedConfig, check_file
from router.client import generate as run_generate
from router.config import config_schema
from router.draw import draw
from router.errors import ClusterError
from router.explain import explain, find_replica
from router.machines import DealtCores, cores_by_rank, local_machines, plan_cores
from router.plan_report import plan_report
from router.plan_table import render
from router.plan_warnings import crossing_warnings
from router.problem import ConfigError
from router.server import run_router

# Plain: a box around an error would be wrapped in a log.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The topology's file, topo.yaml.")]
LogLevelOption = Annotated[LogLevel, typer.Option(case_sensitive=False, help="What is logged.")]


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The topology's file, topo.yaml.")] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Brings the topology of --config up and serves it until SIGINT or SIGTERM."""
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise typer.BadParameter("say which topology to serve: router --config topo.yaml")
    start_logging(log_level)
    console = Console(stderr=True)
    checked = _checked(config)
    try:
        uvloop.run(run_router(checked, console=console))
    except ClusterError as error:
        print(f"router: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def check(
    config: ConfigOption,
    every_rank: Annotated[
        bool, typer.Option(help="List every rank and group of a plan that would be summed up.")
    ] = False,
    without_weights: Annotated[
        bool, typer.Option("--without-weights", help="Plan from the model's config.json alone.")
    ] = False,
) -> None:
    """Says everything that is wrong with a file, or prints the whole plan, with a warning for groups across hosts."""
    checked = _checked(config, config_alone=without_weights)
    report = plan_report(checked.topology, description=checked.description, cores=_known_cores(checked))
    render(report, Console(), every_rank=every_rank)
    for warning in (*checked.warnings, *crossing_warnings(report, config=checked.config)):
        print(f"warning: {warning}", file=sys.stderr)


@app.command("explain")
def explain_command(
    config: ConfigOption,
    rank: Annotated[int, typer.Option(help="A global rank of the replica, from 0.")],
    replica: Annotated[str | None, typer.Option(help="POOL/INDEX; the first of the file when left out.")] = None,
) -> None:
    """Tells one rank's life: its layers, heads, experts, tokens and groups, and its peers in the hand-off."""
    checked = _checked(config)
    try:
        found = find_replica(checked.topology, name=replica, rank=rank)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    cores = cores_by_rank(_known_cores(checked)).get((found.name, rank))
    print(explain(checked.topology, description=checked.description, replica=found, rank=rank, cores=cores))


@app.command("draw")
def draw_command(
    config: ConfigOption,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The SVG file; beside --config by default.")
    ] = None,
) -> None:
    """Draws hosts, devices, pools, groups and the hand-off as an SVG picture."""
    checked = _checked(config)
    path = output or config.with_suffix(".svg")
    try:
        path.write_text(draw(checked.topology, description=checked.description), encoding="utf-8")
    except OSError as error:
        print(f"{path} cannot be written: {error.strerror}; name another file with --output", file=sys.stderr)
        raise typer.Exit(1) from None
    print(path)


@app.command()
def schema() -> None:
    """Prints the JSON schema of topo.yaml."""
    print(json.dumps(config_schema(), indent=2))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; a message of the user where the model chats.")],
    to: Annotated[str, typer.Option(help="The router's HOST:PORT.")] = "127.0.0.1:30000",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, max=2**32 - 1, help="256 where it fits.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Above 0; 1 is off.")] = None,
    top_k: Annotated[int | None, typer.Option(min=-(2**31), max=2**31 - 1, help="0 is off.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="The same gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    raw: Annotated[bool, typer.Option(help="Send the text as it is, without the model's chat template.")] = False,
) -> None:
    """Streams an answer's text to standard output and its timings to standard error."""
    for text in (prompt, *(stop or ())):
        _check_text(text)
    request = inference_pb2.GenerateRequest(
        sampling=inference_pb2.SamplingParams(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop
        )
    )
    if raw:
        request.text = prompt
    else:
        request.chat.messages.add(role="user", content=prompt)
    raise typer.Exit(asyncio.run(run_generate(_router_address(to), request)))


def _known_cores(checked: CheckedConfig) -> tuple[DealtCores, ...]:
    """Those of this machine: what other hosts have is known when their launchers answer."""
    machines = local_machines(checked.topology, environment=os.environ)
    return plan_cores(checked.topology, machines=machines)


def _router_address(text: str) -> str:
    try:
        address = parse_address(text)
    except ValueError as error:
        raise typer.BadParameter(f"--to {text} {error}") from None
    if address.port == 0:
        raise typer.BadParameter(f"--to {text} has port 0; write the port that the router listens on")
    return str(address)


def _check_text(text: str) -> None:
    """Bytes that the terminal's encoding does not have come as lone surrogates, which no message may hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"the text is no UTF-8 at its character {error.start}") from None


def _checked(path: Path, *, config_alone: bool = False) -> CheckedConfig:
    try:
        return check_file(path, config_alone=config_alone)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None

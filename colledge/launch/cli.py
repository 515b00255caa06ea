"""The `colledge` command: reads arguments, calls `launch.run`, prints; every fault is one line and an exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from colledge import __version__
from colledge.errors import ColledgeError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Train a big model on a few unequal devices for the least energy within a deadline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="The formats of the files.", no_args_is_help=True)
app.add_typer(config_app, name="config")

RunFile = Annotated[Path, typer.Argument(help="run.yaml: model, data, batch, steps, pool.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value changes to run.yaml, such as batch.global_size=8.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]


def _console(stderr: bool = False) -> Console:
    from colledge.report.tables import make_console

    return make_console(stderr)


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where to write run.yaml and pool.yaml.")] = Path("."),
) -> None:
    """Write a run.yaml and a pool.yaml for this machine, with every key explained."""
    from colledge.launch.init import write_examples

    for path in write_examples(directory):
        typer.echo(f"wrote {path}")


@app.command()
def profile(
    run_file: RunFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where the profiles go; default: the run's output."),
    ] = None,
) -> None:
    """Measure the devices, their links and the model's layers on them."""
    from colledge.launch import run

    extra = [f"output={output.resolve()}"] if output is not None else []
    inputs = run.read_inputs(run_file, [*(overrides or []), *extra], with_data=False)
    run.profile(inputs, _console())
    typer.echo(f"wrote {inputs.folder.pool_profile} and {inputs.folder.model_profile}")


@app.command()
def plan(
    run_file: Annotated[
        Path | None, typer.Argument(help="run.yaml; or give both profiles instead.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    pool_profile: Annotated[Path | None, typer.Option(help="A pool-profile.json.")] = None,
    model_profile: Annotated[Path | None, typer.Option(help="A model-profile.json.")] = None,
    global_batch_size: Annotated[int | None, typer.Option(help="Samples in a step.", min=1)] = None,
    objective: Annotated[
        str | None, typer.Option(help="energy (default), time or energy-delay.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for plan.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose how to split the model: the least energy (or time) that the measurements allow."""
    from colledge.launch import planning
    from colledge.launch.job import OutputFolder

    folder: OutputFolder | None
    if run_file is not None and (pool_profile or model_profile or global_batch_size or objective or output):
        raise ConfigError(
            "saw run.yaml and options that belong to profiles.",
            fix="change run.yaml's keys, such as objective=time, or give both profiles and no run.yaml.",
        )
    if run_file is not None:
        pool, model, request, folder = planning.from_run(run_file, overrides or [])
    else:
        pool, model, request = planning.from_profiles(
            pool_profile, model_profile, global_batch_size, objective or "energy"
        )
        folder = OutputFolder(output) if output is not None else None
    result = planning.plan(pool, model, request, folder)
    if as_json:
        typer.echo(planning.to_json(result))
        return
    planning.show(result, pool, model, _console())
    if folder is not None:
        typer.echo(f"wrote {folder.plan}")


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan.json; default: the best for the profiles.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="auto: go on from the last checkpoint.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, start nothing.")] = False,
    print_commands: Annotated[
        bool, typer.Option(help="Print the torchrun line of each process; start nothing.")
    ] = False,
) -> None:
    """Train under a plan, then compare what was predicted with what was measured."""
    from colledge.launch import run
    from colledge.launch.rendezvous import write_commands

    if resume not in (None, "auto"):
        raise ConfigError(f"--resume {resume!r} is not known.", fix="use --resume auto.")
    console = _console(stderr=print_commands)  # standard output is for the lines alone
    inputs = run.read_inputs(run_file, overrides or [])
    if plan_file is None and run.read_profiles(inputs) is None and not (dry_run or print_commands):
        run.profile(inputs, console)
    chosen = run.choose_plan(inputs, plan_file, console)
    job = run.training_job(inputs, chosen.plan, resume is not None)
    if print_commands:
        chosen.write(inputs.folder)
        typer.echo(write_commands(job))
        return
    if dry_run:
        typer.echo(f"ready to train {inputs.run.steps} steps under {chosen.plan.describe()}")
        return
    run.train(inputs, chosen, console, resume is not None)
    run.show_report(run.report(inputs.folder), inputs.folder, console)


@app.command()
def report(
    output: Annotated[Path, typer.Argument(help="The output folder of a run.")], as_json: AsJson = False
) -> None:
    """Compare what was predicted with what was measured; writes report.html and report.json."""
    from colledge.launch import run
    from colledge.launch.job import OutputFolder

    folder = OutputFolder(output)
    made = run.report(folder)
    if as_json:
        typer.echo(made.to_json())
    else:
        run.show_report(made, folder, _console())


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the demo's files go.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Steps to train.", min=1)] = 300,
) -> None:
    """Rehearse the whole run on this machine: three emulated devices fine-tune a small Llama on Python's source."""
    from colledge.launch.demo import run_demo

    run_demo(output, steps, _console())


@config_app.command()
def schema(name: Annotated[str, typer.Argument(help="run, pool, plan, report, ...")]) -> None:
    """Print the JSON schema of a file."""
    from colledge.launch.run_config import schema_text

    typer.echo(schema_text(name))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"colledge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; print a fault as one line and exit with its code."""
    try:
        app()
    except ColledgeError as fault:
        print(f"colledge: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
    except OSError as fault:
        print(f"colledge: {fault}. Fix: make room, or give a folder that can be written.", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    except KeyboardInterrupt:
        print("colledge: stopped.", file=sys.stderr)
        sys.exit(130)

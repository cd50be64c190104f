"""The `ppo-ray` command: arguments are parsed first, heavy modules imported after."""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ppo_ray import __version__
from ppo_ray.errors import Interrupted, PPORayError
from ppo_ray.events import escape_controls
from ppo_ray.run import commands

_DEMOS = Path(__file__).parent / "assets"  # with configs/imdb.yaml and others, for those who have the package alone
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    help="PPO for language models as Ray actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class AssetSet(StrEnum):
    """What `ppo-ray assets` can build."""

    imdb = "imdb"
    arithmetic = "arithmetic"
    assistant = "assistant"
    toy = "toy"


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Options that win over the file's, e.g. steps=5 ppo.learning_rate=1e-5."),
]
Host = Annotated[str, typer.Option(help="Address to listen at; any other than loopback is a network's.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="To listen at; 0: a free one.")]


def main() -> None:
    """Run the command and exit with its code: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C, or a job's own."""
    try:
        app()
    finally:
        gc.freeze()  # else Python looks through all that was imported for garbage before it ends: a second


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"ppo-ray {__version__}")
        raise typer.Exit


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/imdb.yaml.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in output_dir from its newest checkpoint.")
    ] = False,
) -> None:
    """Train a policy with PPO as CONFIG says; everything about the run goes into its output_dir.

    `ppo-ray options` shows every option. A run that was stopped or failed goes on with --resume.
    Exit codes: 0 the run is done, 1 it failed, 2 bad input (nothing was started), 130 Ctrl-C, 143 SIGTERM.
    """
    with report_errors():
        from ppo_ray.config import load_config

        parsed = load_config(config, [*(overrides or []), *(["resume=required"] if resume else [])])

        from ppo_ray.run.train import train

        train(parsed)


@app.command()
def demo(
    overrides: Overrides = None,
    task: Annotated[
        AssetSet,
        typer.Option(
            "--task",
            help="imdb: happier film reviews. arithmetic: a chat model learns sums. assistant: warmer answers. toy: a "
            "first look in a minute.",
        ),
    ] = AssetSet.imdb,
) -> None:
    """Build a demo's models and data, then train as configs/imdb.yaml says: 30 steps on two CPU cores.

    Called again, it goes on with a run that was stopped, and shows what a finished one left. More steps: steps=40.
    A run with other options needs another folder: output_dir=runs/other seed=1.
    """
    with report_errors():
        from ppo_ray.config import load_config

        parsed = load_config(_DEMOS / f"{task.value}.yaml", ["resume=auto", *(overrides or [])])

        from ppo_ray.assets.build import build_assets

        build_assets(task.value)

        from ppo_ray.run.train import train

        train(parsed)


@app.command()
def evaluate(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A checkpoint folder, e.g. RUN/checkpoints/final, or a CONFIG.")
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, all else as errors.")] = False,
) -> None:
    """Score responses to the held-out prompts: of a checkpoint by its run's config, or of the model of a CONFIG."""
    with report_errors():
        from rich.console import Console

        from ppo_ray.run.train import evaluate

        evaluation = evaluate(source, overrides or [], Console(stderr=as_json))
        if as_json:
            typer.echo(evaluation.to_json())


@app.command()
def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/imdb.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Start what CONFIG needs and prove that new weights change what every engine computes; train nothing."""
    with report_errors():
        from ppo_ray.config import load_config

        parsed = load_config(config, overrides or [])
        from ppo_ray.run.train import check

        check(parsed)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/imdb.yaml.")],
    overrides: Overrides = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of the cluster; this machine if none of these.")
    ] = None,
    cpus: Annotated[float | None, typer.Option(min=0, help="CPUs of each node.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of each node.")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="Memory of each node, GiB.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(min=0, help="Memory of each GPU, GiB.")] = None,
    address: Annotated[str | None, typer.Option(help="Address of a running cluster, e.g. auto, to be asked.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also what each actor's memory is made of.")] = False,
) -> None:
    """Say whether CONFIG fits (exit code 2 if not), where each actor would go, and the memory it takes."""
    with report_errors():
        from ppo_ray.config import load_config

        parsed = load_config(config, overrides or [])

        from rich.console import Console

        from ppo_ray.run.plan import Described, show

        described = Described(nodes, cpus, gpus, memory, gpu_memory, address)
        if not show(parsed, described, Console(), verbose):
            raise typer.Exit(2)


@app.command("serve-reward")
def serve_reward(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/imdb.yaml.")],
    overrides: Overrides = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="A variable with the token that requests must have.")
    ] = None,
) -> None:
    """Serve the reward of CONFIG over HTTP, for the reward.url of other runs."""
    with report_errors():
        from ppo_ray.config import load_config

        parsed = load_config(config, overrides or [])
        from ppo_ray.reward.serve import serve
        from ppo_ray.rollout.judge import start_judge

        serve(parsed, host, port, token_env, partial(typer.echo, err=True), start_judge)


@app.command()
def view(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, finished or under way.")],
    host: Host = "127.0.0.1",
    port: Port = 0,
) -> None:
    """Show runs in the browser: curves, every response token by token, distributions, seconds."""
    with report_errors():
        from ppo_ray.view.server import serve

        serve(runs, host, port, partial(typer.echo, err=True))


@app.command()
def options(
    section: Annotated[
        str | None, typer.Argument(metavar="SECTION", help="One section's, e.g. rollout; all if it is left out.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them as docs/options.md.")] = False,
) -> None:
    """Show every option of a CONFIG: what it may be, its default, what it means."""
    with report_errors():
        from ppo_ray.config import reference

        if markdown:
            typer.echo(reference.to_markdown(), nl=False)
            return

        reference.print_tables(section)


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; output_dir must be absolute.")],
    address: Annotated[
        str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The head's dashboard, http://HOST:8265.")
    ],
    overrides: Overrides = None,
    working_dir: Annotated[
        Path | None, typer.Option("--working-dir", help="A folder to send: a reward function, small data.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME", help="A variable to forward by name; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the job, new to the cluster.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log; exit with the job's code.")] = True,
) -> None:
    """Train as `train` does, as a job on a Ray cluster; sent again, it goes on from its newest checkpoint."""
    with report_errors():
        from ppo_ray.jobs import submit as submission
        from ppo_ray.jobs.request import JobRequest, make_job_name

        parsed = submission.load_job_config(config, overrides or [])
        request = JobRequest(parsed, address, name or make_job_name(config), working_dir, tuple(env or ()))
        code = submission.submit(request, wait, partial(typer.echo, nl=False), typer.echo)
    raise typer.Exit(code)


@app.command()
def assets(
    name: Annotated[
        AssetSet,
        typer.Argument(metavar="NAME", help="imdb, arithmetic, assistant or toy: what configs/NAME.yaml needs."),
    ],
    force: Annotated[bool, typer.Option("--force", help="Build again what is there already.")] = False,
) -> None:
    """Build a demo's models and data into the cache; no hub is needed."""
    with report_errors():
        from ppo_ray.assets.build import build_assets

        build_assets(name.value, force=force)


@contextmanager
def report_errors() -> Iterator[None]:
    """Print our own errors on stderr and exit with their code; anything else is a bug and keeps its traceback."""
    try:
        yield
    except Interrupted as interrupted:
        typer.echo(str(interrupted), err=True)
        raise typer.Exit(interrupted.exit_code) from None
    except PPORayError as error:
        typer.secho(escape_controls(f"error: {error}"), fg="red", err=True)
        raise typer.Exit(error.exit_code) from None
    except SystemExit as leaving:  # raised by Ray for SIGTERM while it starts and ends
        if leaving.code != signal.SIGTERM:
            raise
        typer.echo("interrupted by SIGTERM", err=True)
        raise typer.Exit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(_INTERRUPTED) from None


commands.register(app, Overrides, report_errors)

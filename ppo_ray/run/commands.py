"""The commands for what a run has left: `show`, `track`, `report`, `merge`. Heavy modules are imported in a command."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from ppo_ray.events import escape_controls


def register(app: typer.Typer, overrides: Any, report_errors: Callable[[], AbstractContextManager[None]]) -> None:
    """Add the commands to an application.

    Args:
        app: of the command line.
        overrides: the type of an argument of `key=value` options.
        report_errors: a block whose errors are printed and end the process with their exit code.
    """

    @app.command()
    def show(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, under way or done.")],
        worst: Annotated[int | None, typer.Option(min=1, metavar="N", help="The N worst responses.")] = None,
        best: Annotated[int | None, typer.Option(min=1, metavar="N", help="The N best responses.")] = None,
        by: Annotated[
            str, typer.Option(metavar="FIGURE", help="score, kl, advantage, reward, value, mismatch, tokens or a part.")
        ] = "score",
        step: Annotated[
            list[int] | None,
            typer.Option(metavar="N", help="Of this step alone; may be repeated. Negative: from the end."),
        ] = None,
        contains: Annotated[
            str | None, typer.Option(metavar="TEXT", help="Only prompts or responses with this text.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="A line of JSON per response or step.")] = False,
    ) -> None:
        """Show a run's steps, or its best and worst responses.

        Without an option: the figures of its last steps. Worst is the lowest score, reward, value or advantage, and the
        highest KL, mismatch or number of tokens.

        Examples: ppo-ray show runs/imdb --worst 20 --by kl; ppo-ray show runs/imdb --step -1 --json
        """
        with report_errors():
            from rich.console import Console

            from ppo_ray.run.show import Selection, print_responses, print_steps, select

            if worst is None and best is None and step is None and contains is None:
                print_steps(run, Console(), as_json)
                return
            selection = Selection(worst, best, by, tuple(step or ()), contains)
            print_responses(
                select(run, selection, lambda note: typer.echo(escape_controls(note), err=True)), Console(), as_json
            )

    @app.command()
    def track(
        config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file that the run was trained with.")],
        overrides: overrides = None,
    ) -> None:
        """Send what the trackers of a run lack that has ended: they were out of reach, or named afterwards.

        CONFIG and the options are the run's; tracking.* may differ. Exit code 1: a tracker still lacks something.
        """
        with report_errors():
            from ppo_ray.config import load_config

            parsed = load_config(config, overrides or [])

            from ppo_ray.run.tracking import send_rest

            if not send_rest(parsed, lambda line: typer.echo(escape_controls(line))):
                raise typer.Exit(1)

    @app.command()
    def report(
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or under way.")],
        output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")] = Path("report.html"),
    ) -> None:
        """Write a run's report: one HTML page without network or scripts."""
        with report_errors():
            from ppo_ray.run.record import RunRecord
            from ppo_ray.run.report import write_report

            write_report(RunRecord.read(run), output)

    @app.command()
    def merge(
        checkpoint: Annotated[
            Path, typer.Argument(metavar="CHECKPOINT", help="E.g. RUN/checkpoints/final, of adapters.")
        ],
        output: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder to be made.")],
        bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Round to bfloat16; else float32.")] = False,
        base: Annotated[str | None, typer.Option(help="The base, if it is not where the checkpoint says.")] = None,
    ) -> None:
        """Make a whole model of a checkpoint of adapters (LoRA) and their base; it loads without peft."""
        with report_errors():
            from ppo_ray.models.merging import merge_checkpoint

            merge_checkpoint(checkpoint, output, "bfloat16" if bfloat16 else "float32", base)

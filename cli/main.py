"""The `mmea` command: its subcommands, its version and its exit codes.

Exit codes: 0; 1 for a failure that one line explains; 2 for wrong usage; 130 when interrupted.
Nothing heavy is imported here or at the top of a subcommand's file, so that help comes at once.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmea_calc.errors import MMEAError
from mmea_calc.fast.memory import keep_freed_memory

from .analyse import analyse
from .backbone import app as backbone_app
from .benchmark import app as benchmark_app
from .check import check
from .compare import compare
from .compile import compile
from .convert import convert
from .evaluate import evaluate
from .explain import leave
from .export import app as export_app
from .finetune import finetune
from .fold import fold
from .info import info
from .inspect import inspect
from .machine import use_threads
from .md import md
from .prepare import prepare
from .pretrain import app as pretrain_app
from .serve import serve
from .several import any_word, is_number, is_setting, several_values


class ExplainedErrors(TyperGroup):
    """A group of commands that turns the errors a user can cause into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _tell
            try:
                return super().invoke(ctx)
            except (MMEAError, OSError, KeyboardInterrupt) as error:
                raise leave(error) from None


def _tell(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a user reads it, without the place in the code; until the command ends."""
    typer.echo(f"warning: {message}", err=True)


app = typer.Typer(
    name="mmea",
    cls=ExplainedErrors,
    help="Fine-tune equivariant interatomic potentials with small adapter files, and run them.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback that does reach a user is a bug: the plain one is what a report needs.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(prepare)
app.command(cls=several_values({"--sweep": is_setting, "--slurm": is_setting}))(finetune)
app.command()(evaluate)
app.command(cls=several_values({"--temperature": is_number}))(md)
app.command()(serve)
app.command()(check)
app.command()(convert)
app.command()(compile)
app.command()(fold)
app.command()(info)
app.command()(inspect)
app.command()(analyse)
app.command(cls=several_values({"--methods": any_word, "--seeds": is_number}))(compare)
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(backbone_app, name="backbone")
app.add_typer(export_app, name="export")
app.add_typer(pretrain_app, name="pretrain")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mmea {version('mmea')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of this process; torch's choice if not given.", min=1)
    ] = None,
) -> None:
    """Fine-tune equivariant interatomic potentials with small adapter files, and run them."""
    use_threads(threads)


def main() -> None:
    """Entry point of the console script."""
    keep_freed_memory()
    app(prog_name="mmea")


if __name__ == "__main__":
    main()

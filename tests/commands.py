"""The `mmea` command, called within the process of a test."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from mmea_cli.main import app


def mmea(*arguments: object) -> Result:
    """What the command with these arguments prints and how it ends."""
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="mmea")

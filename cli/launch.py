"""One command in several processes: started here for `--devices`, or by torchrun."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any

import typer

from .explain import leave


def run_together(devices: int | None, device: str, run: Callable[[Any, str], None]) -> None:
    """Call `run` with the processes that train together (a `mmea_calc.training.team.Team`) and the device of this one.

    Args:
        devices: processes to start on this machine; None or 1 starts none. A process that torchrun started is one of
            those already.
        device: as the user named it.

    Raises:
        typer.Exit: in all processes, when one of them has failed; one line says why.
    """
    from mmea_calc.errors import TrainingError
    from mmea_calc.training.team import SOLO, launched

    if devices is not None and devices < 1:
        raise TrainingError(f"devices must be at least 1, got {devices}")
    if launched():
        _join(devices, device, run)
    elif devices is None or devices == 1:
        run(SOLO, device)
    else:
        start(devices, ["-m", "mmea_cli", *sys.argv[1:]])


def _join(devices: int | None, device: str, run: Callable[[Any, str], None]) -> None:
    from mmea_calc.errors import MMEAError, TrainingError
    from mmea_calc.training.team import TeamEndedError, joined

    with joined(device) as (team, own):
        try:
            if devices not in (None, team.size):
                raise TrainingError(f"--devices is {devices}, but {team.size} processes were started: leave it out")
            with ExitStack() as stack:
                if not team.leads:  # what all of them would say is said once
                    nowhere = stack.enter_context(open(os.devnull, "w"))
                    stack.enter_context(redirect_stdout(nowhere))
                    stack.enter_context(redirect_stderr(nowhere))
                run(team, own)
        except TeamEndedError:
            raise typer.Exit(1) from None  # the one that ended first has said why
        except (MMEAError, OSError, KeyboardInterrupt) as error:
            if not team.claim():
                raise typer.Exit(1) from None
            # Printed before the connections close: the others end then, and whoever started them ends this one.
            raise leave(error) from None


def start(devices: int, arguments: list[str]) -> None:
    """Run Python with these arguments in so many processes of this machine, as torchrun does.

    Raises:
        KeyboardInterrupt: a signal has ended them.
        typer.Exit: one of them has failed, and all have ended.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its account of failures is for those who start processes by hand; here one line tells.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    threads = max(1, (os.cpu_count() or 1) // devices)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else each process would take all cores
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(settings, sys.executable)(*arguments)
    except SignalException:
        raise KeyboardInterrupt("go on with --resume") from None
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        killed = [code for code in codes if code < 0 and -code != signal.SIGTERM]
        if killed:
            name = signal.Signals(-killed[0]).name
            typer.echo(
                f"mmea: a process of this training was ended by {name}, perhaps for lack of memory; "
                "go on with --resume",
                err=True,
            )
        raise typer.Exit(max([1, *(code for code in codes if code > 0)])) from None


__all__ = ["run_together", "start"]

"""What every one of several processes does for tests/test_parallel.py; started as torchrun starts them."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import typer

from mmea_calc.errors import DataError
from mmea_calc.training.team import Team, joined


def train(folder: Path) -> None:
    """Gradients of batches, a training, one that goes on from one process's checkpoint, and one from prepared data."""
    from test_finetuning import QUICK, SMALL, tiny_backbone
    from test_parallel import BATCHES, SHORT, STEADY, trainer

    from mmea_calc.data.prepared import open_prepared
    from mmea_calc.data.reading import read_dataset
    from mmea_calc.training.finetuning import finetune

    torch.set_num_threads(1)
    data, valid = (read_dataset(folder / name) for name in ("train.xyz", "valid.xyz"))
    with joined("cpu") as (team, _):
        found = {}
        for name, config in STEADY.items():
            at_work = trainer(data, valid, config, team=team)
            found[name] = [at_work._from_all(rows, 1)[1] for rows in BATCHES]
        at_work = trainer(data, valid, replace(QUICK, epochs=2), team=team)
        at_work.run()
        state = {"parameters": at_work.parameters, "optimiser": at_work.optimiser.state_dict()}
        torch.save({"gradients": found, "state": state}, folder / f"process{team.rank}.pt")
        for output, source, resume in (("two", data, False), ("parts", data, True), ("lazy", None, False)):
            finetune(
                source or open_prepared(folder / "train.h5"),
                folder / f"{output}.adapter",
                valid=valid,
                backbone=tiny_backbone(),
                adapter=SMALL,
                training=SHORT,
                resume=resume,
                team=team,
            )


def fail(kind: str) -> None:
    """One process fails in the way that `kind` names, while the other waits for it."""
    from mmea_cli.launch import run_together

    def run(team: Team, device: str) -> None:
        print(f"process {team.rank} says this once")
        if team.rank == int(kind[-1]):
            if kind.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError("structure 17 is missing")
        team.gather(0)
        team.sum(torch.zeros(3))

    try:
        run_together(None, "cpu", run)
    except typer.Exit as end:
        sys.exit(end.exit_code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    train(Path(sys.argv[2])) if sys.argv[1] == "train" else fail(sys.argv[1])

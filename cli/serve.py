"""`mmea serve`: computes forces for i-PI, or for ASE's SocketIOCalculator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import OwnBackbone, OwnDevice, OwnDtype, OwnHead

if TYPE_CHECKING:
    from ase import Atoms

    from mmea_calc.potential import Potential

ADDRESS = "Where i-PI listens: --port or --unix"


def serve(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="An .adapter file, or name or path of a backbone.", show_default=False),
    ],
    structure: Annotated[
        Path,
        typer.Argument(
            metavar="STRUCTURE",
            help="A structure with the species, in i-PI's order, and the periodic directions; any file ASE reads.",
            show_default=False,
        ),
    ],
    port: Annotated[
        int | None, typer.Option(help="TCP port, as <port> in <ffsocket>.", rich_help_panel=ADDRESS)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Host that i-PI runs on, as <address>.", rich_help_panel=ADDRESS)
    ] = "localhost",
    unix: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="<address> of mode 'unix': the file /tmp/ipi_NAME.", rich_help_panel=ADDRESS),
    ] = None,
    connections: Annotated[int, typer.Option(help="Structures to compute at a time, as one batch.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Structures per call of the network at most.", min=1)] = 64,
    wait: Annotated[float, typer.Option(help="Seconds to wait for i-PI to listen.", min=0)] = 60,
    force: Annotated[bool, typer.Option("--force", help="Serve an adapter that is not equivariant.")] = False,
    backbone: OwnBackbone = None,
    head: OwnHead = None,
    device: OwnDevice = None,
    dtype: OwnDtype = None,
) -> None:
    """Connect to a running i-PI and compute its forces; run it on as many hosts as you like.

    Ends when i-PI does. Exit code 1 when a connection broke.
    """
    if (port is None) == (unix is None):
        raise typer.BadParameter("give --port or --unix, the one that i-PI's <ffsocket> has", param_hint="'--port'")
    from mmea_calc.config import MDConfig
    from mmea_calc.ipi import client
    from mmea_calc.md import open_potential
    from mmea_calc.md.simulation import check_equivariant

    address = client.unix(unix) if unix is not None else client.tcp(host, port or 0)
    atoms = _read(structure)
    defaults = MDConfig()
    potential = open_potential(
        adapter, backbone=backbone, head=head, device=device or defaults.device, dtype=dtype or defaults.dtype
    )
    check_equivariant(potential, force)
    _log(f"{adapter}: {_about(atoms, potential)}")
    if unseen := _unseen(adapter, atoms):
        _log(f"{adapter} has seen no {', '.join(unseen)} in training: there it extrapolates")
    served = client.serve(
        potential, atoms, address, connections=connections, wait_s=wait, batch_size=batch_size, log=_log
    )
    _log(f"{served.n_structures} structures in {served.n_calls} calls of the network")
    if served.faults:
        raise typer.Exit(1)


def _read(file: Path) -> Atoms:
    from ase.io import read

    from mmea_calc.errors import DataError

    if not file.is_file():
        raise DataError(f"{file}: no such file with a structure")
    try:
        atoms = read(file, index=0)
    except Exception as problem:  # whatever a reader of ASE raises for a file that it does not understand
        raise DataError(f"{file} cannot be read as a structure: {problem}") from problem
    assert not isinstance(atoms, list)
    return atoms


def _about(atoms: Atoms, potential: Potential) -> str:
    """What will be computed: the protocol tells neither species nor periodicity, so both are said here."""
    axes = [name for name, periodic in zip("abc", atoms.pbc, strict=True) if periodic]
    periodic = f"periodic along {' '.join(axes)}" if axes else "not periodic"
    where = f"{str(potential.dtype).removeprefix('torch.')} on {potential.device}"
    return f"{len(atoms)} atoms, {atoms.get_chemical_formula()}, {periodic}; {potential.backbone.name} in {where}"


def _unseen(adapter: str, atoms: Atoms) -> list[str]:
    """Symbols of the structure that were not in the adapter's training data."""
    from mmea_calc.adapter_file import is_adapter, read_adapter

    return read_adapter(adapter).unseen(atoms.numbers) if is_adapter(adapter) else []


def _log(line: str) -> None:
    """To standard error, with the time: these are for a job's log."""
    import time

    typer.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)

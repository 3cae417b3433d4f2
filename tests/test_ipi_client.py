"""`serve`: forces over real sockets, for ASE, for i-PI, and for peers that do not keep to the protocol."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.socketio import SocketIOCalculator
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from commands import mmea
from engine_potentials import potential, reference
from test_ipi_protocol import init, posdata, word

from conftest import crystal, ethanol
from mmea_calc.errors import DataError, EngineError
from mmea_calc.ipi import client as ipi_client
from mmea_calc.ipi.client import Address, Served, serve, tcp, unix
from mmea_calc.ipi.protocol import Session

SECONDS = 30.0  # after which a test that hangs fails


@contextmanager
def serving(atoms: Atoms, there: Address | Peer, **options: Any) -> Iterator[tuple[Future[Served], list[str]]]:
    """`serve` in a thread of its own; its result and its log."""
    lines: list[str] = []
    address = there.address if isinstance(there, Peer) else there
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(serve, potential(), atoms, address, wait_s=SECONDS, log=lines.append, **options), lines
        finally:
            if isinstance(there, Peer):
                there.close()  # or a test that fails would wait for the thread for ever


@pytest.fixture
def name() -> str:
    """Of a unix socket."""
    return f"mmea_test_{uuid.uuid4().hex[:12]}"


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def compared(atoms: Atoms, other: Atoms) -> None:
    """Energy, forces, and the stress where there is one, of `other` are ASE's for the same structure."""
    atoms = atoms.copy()
    atoms.calc = reference()
    assert other.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(other.get_forces(), atoms.get_forces(), atol=1e-9)
    if atoms.pbc.all():
        assert np.abs(atoms.get_stress()).max() > 1e-3
        np.testing.assert_allclose(other.get_stress(), atoms.get_stress(), atol=1e-10)


# -- ASE on the other side ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["unix", "tcp"])
def test_ase_gets_energies_forces_and_stress_of_changing_structures(mode: str, name: str) -> None:
    port = free_port()
    start = crystal() * (2, 1, 1) if mode == "unix" else ethanol()
    there = {"unixsocket": name} if mode == "unix" else {"port": port}
    with serving(start, unix(name) if mode == "unix" else tcp("localhost", port)) as (served, log):
        with SocketIOCalculator(**there, timeout=SECONDS) as calculator:
            atoms = start.copy()
            atoms.calc = calculator
            for seed in range(3):
                atoms.rattle(0.03, seed=seed)
                if mode == "unix":
                    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.01 * np.tri(3)), scale_atoms=True)
                compared(atoms, atoms)
        result = served.result(SECONDS)
    assert result.faults == []
    assert result.n_structures == 3
    assert log[-1] == "connection 1 ended: i-PI has no more requests"


# -- peers of our own ---------------------------------------------------------------------------------------------


class Peer:
    """Listens as i-PI does, and sends what a test wants."""

    def __init__(self, connections: int = 1) -> None:
        self.server = socket.create_server(("localhost", 0))
        self.server.settimeout(SECONDS)
        self.address = tcp("localhost", self.server.getsockname()[1])
        self.connections = connections
        self.sockets: list[socket.socket] = []

    def accept(self) -> list[socket.socket]:
        for _ in range(self.connections):
            one, _ = self.server.accept()
            one.settimeout(SECONDS)
            self.sockets.append(one)
        return self.sockets

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for one in (*self.sockets, self.server):
            one.close()


def received(peer: socket.socket, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes and (more := peer.recv(n_bytes - len(data))):
        data += more
    return data


def request(atoms: Atoms) -> bytes:
    return posdata(atoms.cell.array, atoms.positions) + word("GETFORCE")


def energy_of(peer: socket.socket, n_atoms: int) -> float:
    reply = received(peer, 12 + 8 + 4 + 24 * n_atoms + 72 + 4)
    assert reply[:12] == word("FORCEREADY")
    (energy,) = struct.unpack("=d", reply[12:20])
    return float(energy) * units.Hartree


def boxed() -> Atoms:
    atoms = ethanol()
    atoms.set_cell([20.0, 21.0, 22.0])
    return atoms


def expected_energy(atoms: Atoms) -> float:
    copy = atoms.copy()
    copy.calc = reference()
    return float(copy.get_potential_energy())


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (lambda atoms: b"GET / HTTP/1.1\r\nHost: localhost\r\n", "expected one of STATUS"),
        (lambda atoms: posdata(atoms.cell.array, atoms.positions[:4]), "expected POSDATA of 9 atoms.* got 4"),
        (lambda atoms: posdata(atoms.cell.array, atoms.positions * np.nan), "not finite"),
        (lambda atoms: posdata(atoms.cell.array, atoms.positions * 1e9), "expected coordinates up to"),
        (lambda atoms: word("GETFORCE"), "GETFORCE came when"),
    ],
)
def test_a_malformed_message_ends_its_connection_with_a_line_and_nothing_else(
    bad: Callable[[Atoms], bytes], why: str
) -> None:
    atoms = boxed()
    with Peer(2) as peer, serving(atoms, peer, connections=2) as (served, log):
        wrong, right = peer.accept()
        wrong.sendall(bad(atoms))
        assert received(wrong, 1) == b""  # closed
        for _ in range(2):
            right.sendall(word("STATUS") + init() + request(atoms))
            assert received(right, 12) in (word("NEEDINIT"), word("READY"))
            assert energy_of(right, len(atoms)) == pytest.approx(expected_energy(atoms), abs=1e-9)
        right.sendall(word("EXIT"))
        result = served.result(SECONDS)
    assert result.n_structures == 2
    assert len(result.faults) == 1
    assert re.search(why, result.faults[0])
    ended = [line for line in log if line.startswith("connection") and "no more requests" not in line]
    assert len(ended) == 1
    assert "\n" not in ended[0]
    assert re.search(why, ended[0])


def test_a_collapsed_cell_is_refused_before_its_neighbours_are_sought() -> None:
    atoms = crystal()
    with Peer() as peer, serving(atoms, peer) as (served, _):
        (one,) = peer.accept()
        one.sendall(posdata(atoms.cell.array / 20, atoms.positions / 20))
        assert received(one, 1) == b""
        (fault,) = served.result(SECONDS).faults
    assert re.search(r"at least 0\.5 A\^3 per atom", fault)


def test_requests_that_come_together_are_computed_together() -> None:
    atoms = boxed()
    structures = [atoms.copy() for _ in range(4)]
    for seed, one in enumerate(structures):
        one.rattle(0.05, seed=seed)
    served = Served()
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        loop = ipi_client._Loop(ipi_client.Forces(potential(), atoms, 64), selector, served, lambda line: None)
        theirs = []
        for number, structure in enumerate(structures):
            mine, other = (stack.enter_context(one) for one in socket.socketpair())
            mine.setblocking(False)
            loop.add(ipi_client._Connection(number, mine, Session(len(atoms))))
            other.sendall(request(structure) + word("EXIT"))
            theirs.append(other)
        loop.run()
        for one, structure in zip(theirs, structures, strict=True):
            assert energy_of(one, len(atoms)) == pytest.approx(expected_energy(structure), abs=1e-9)
    assert (served.n_structures, served.n_calls, served.faults) == (4, 1, [])


def test_a_large_batch_is_cut_into_calls_and_answered_in_order() -> None:
    atoms, n = boxed(), 5
    positions = np.stack([atoms.positions + 0.02 * i * np.sin(np.arange(27.0)).reshape(9, 3) for i in range(n)])
    matrix = atoms.cell.array.T / units.Bohr
    message = init(f"batch_size:{n}") + word("POSDATA") + struct.pack("=i", 9)
    message += n * (matrix.tobytes() + np.linalg.inv(matrix).tobytes()) + (positions / units.Bohr).tobytes()
    with Peer() as peer, serving(atoms, peer, batch_size=2) as (served, _):
        (one,) = peer.accept()
        one.sendall(message + word("GETFORCE"))
        reply = received(one, 12 + 8 * n + 4 + n * (27 + 9) * 8 + 4 * n)
        one.sendall(word("EXIT"))
        result = served.result(SECONDS)
    energies = np.frombuffer(reply[12 : 12 + 8 * n]) * units.Hartree
    wanted = [expected_energy(Atoms(atoms.numbers, x)) for x in positions]
    assert len(set(np.round(wanted, 6))) == n
    np.testing.assert_allclose(energies, wanted, atol=1e-9)
    assert (result.n_structures, result.n_calls) == (n, 3)


def test_a_peer_that_falls_silent_in_a_message_does_not_hold_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipi_client, "PATIENCE_S", 0.2)
    atoms = boxed()
    with Peer(2) as peer, serving(atoms, peer, connections=2) as (served, _):
        silent, other = peer.accept()
        silent.sendall(request(atoms)[:100])
        assert received(silent, 1) == b""
        time.sleep(0.3)  # silence between messages is nothing wrong
        other.sendall(request(atoms))
        assert energy_of(other, len(atoms)) == pytest.approx(expected_energy(atoms), abs=1e-9)
        other.sendall(word("EXIT"))
        result = served.result(SECONDS)
    assert len(result.faults) == 1
    assert "stopped in the middle of a message" in result.faults[0]


def test_a_peer_that_never_listens_fills_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipi_client, "PATIENCE_S", 0.5)
    atoms = boxed()
    with Peer() as peer, serving(atoms, peer) as (served, _):
        (one,) = peer.accept()
        sent, limit = 0, 100e6
        with suppress(ConnectionError):
            while sent < limit:
                sent += one.send(word("STATUS") * 10000)
        (fault,) = served.result(SECONDS).faults
    assert "has not taken its answer" in fault
    assert sent < limit


def test_a_peer_that_leaves_in_the_middle_is_a_fault_and_one_that_leaves_between_messages_is_none() -> None:
    atoms = boxed()
    with Peer(2) as peer, serving(atoms, peer, connections=2) as (served, _):
        first, second = peer.accept()
        first.sendall(word("STATUS"))
        received(first, 12)
        first.close()
        second.sendall(posdata()[:50])
        second.close()
        result = served.result(SECONDS)
    assert result.faults == ["connection 2: the other side left in the middle of a request"]


def test_an_address_where_nobody_listens_is_named(name: str) -> None:
    for address in (unix(name), unix(f"/nonexistent/{name}"), tcp("localhost", free_port()), unix("x" * 300)):
        with pytest.raises(EngineError, match=r"nobody answers at .*expected i-PI to listen"):
            serve(potential(), ethanol(), address, wait_s=0)
    for port in (0, -1, 65536):
        with pytest.raises(EngineError, match="port from 1 to 65535"):
            tcp("localhost", port)


def test_a_structure_that_the_network_cannot_take_is_refused_before_anything_is_connected() -> None:
    with pytest.raises(DataError, match="has Au"):
        serve(potential(), Atoms("Au"), tcp("localhost", free_port()), wait_s=0)


# -- the real i-PI ------------------------------------------------------------------------------------------------

# The command of this environment, which need not be on the path.
IPI = shutil.which("i-pi", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_ipi = pytest.mark.skipif(IPI is None, reason="i-PI is not installed: pip install 'mmea[ipi]'")

INPUT = """
<simulation verbosity='low'>
 <output prefix='out'>
  <properties stride='1' filename='properties'> [step, potential, conserved, virial_md] </properties>
  <trajectory filename='positions' stride='1' format='ase'> positions </trajectory>
  <trajectory filename='forces' stride='1' format='ase'> forces </trajectory>
 </output>
 <total_steps>5</total_steps>
 <prng><seed>7</seed></prng>
 <ffsocket name='mmea' mode='{mode}' pbc='false'>
  <address>{address}</address> <port>{port}</port> <latency>1e-3</latency> <batch_size>{batch_size}</batch_size>
 </ffsocket>
 <system>
  <initialize nbeads='{beads}'>
   <file mode='ase' units='ase'> start.xyz </file>
   {velocities}
  </initialize>
  <forces> <force forcefield='mmea'/> </forces>
  <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
  <motion mode='dynamics'>
   <fixcom> False </fixcom>
   <dynamics mode='nve'> <timestep units='femtosecond'> 2 </timestep> </dynamics>
  </motion>
 </system>
</simulation>
"""


def run_ipi(folder: Path, atoms: Atoms, *, beads: int, mode: str, name: str, **options: int) -> Served:
    """Five steps of i-PI with our forces; `options` are `connections` and `batch_size` of i-PI."""
    port = free_port()
    # (i-PI needs a cell, and what it reads is periodic to it)
    write(folder / "start.xyz", atoms)
    batch_size = options.get("batch_size", 1)
    values = dict(mode=mode, address=name if mode == "unix" else "localhost", port=port, beads=beads)
    # All beads start at one place: their velocities take them apart.
    velocities = "<velocities mode='thermal' units='kelvin'> 300 </velocities>" if beads > 1 else ""
    (folder / "input.xml").write_text(INPUT.format(**values, batch_size=batch_size, velocities=velocities))
    address = unix(name) if mode == "unix" else tcp("localhost", port)
    with (
        (folder / "log").open("w") as log,
        serving(atoms, address, connections=options.get("connections", 1)) as (
            served,
            _,
        ),
    ):
        ipi = subprocess.Popen([str(IPI), "input.xml"], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            assert ipi.wait(SECONDS) == 0, (folder / "log").read_text()
        finally:
            ipi.kill()
        return served.result(SECONDS)


def frames(folder: Path, what: str, bead: str) -> list[Atoms]:
    found = read(folder / f"out.{what}_{bead}.extxyz", index=":")
    assert isinstance(found, list)
    return found


@needs_ipi
def test_nve_of_ipi_is_nve_of_ase(tmp_path: Path, name: str) -> None:
    start = crystal() * (2, 1, 1)
    start.rattle(0.2, seed=1)
    # i-PI's cells are upper triangular: this is the same crystal, turned.
    start.set_cell(start.cell.standard_form()[0], scale_atoms=True)
    result = run_ipi(tmp_path, start, beads=1, mode="inet", name=name)
    assert result.faults == []
    properties = np.loadtxt(tmp_path / "out.properties")
    atoms = start.copy()
    atoms.calc = reference()
    atoms.set_masses([{"C": 12.0107, "O": 15.9994}[symbol] for symbol in atoms.symbols])  # i-PI's
    dynamics = VelocityVerlet(atoms, 2 * units.fs)
    moved = 0.0
    # i-PI's A and eV have 8 digits: lengths and energies differ from ASE's by 1e-8 of themselves, or 1e-7
    both = zip(frames(tmp_path, "positions", "0"), frames(tmp_path, "forces", "0"), strict=True)
    for step, (frame, forces) in enumerate(both):
        assert properties[step, 1] * units.Hartree == pytest.approx(atoms.get_potential_energy(), abs=2e-5)
        np.testing.assert_allclose(frame.positions, atoms.positions, atol=1e-6)
        np.testing.assert_allclose(forces.get_forces(), atoms.get_forces(), atol=1e-5)
        moved = float(np.abs(frame.positions - start.positions).max())
        # i-PI gives xx, yy, zz, xy, xz, yz of the virial, per volume
        stress = -properties[step, [3, 4, 5, 8, 7, 6]] * units.Hartree / units.Bohr**3
        np.testing.assert_allclose(stress, atoms.get_stress(), atol=1e-6)
        dynamics.run(1)
    assert moved > 1e-3


@needs_ipi
@pytest.mark.parametrize("options", [dict(batch_size=4), dict(connections=3)], ids=["one batch", "three connections"])
def test_every_bead_of_a_path_integral_gets_its_own_forces(tmp_path: Path, name: str, options: dict[str, int]) -> None:
    start = boxed()
    result = run_ipi(tmp_path, start, beads=4, mode="unix", name=name, **options)
    assert result.faults == []
    assert result.n_structures == 4 * 6
    if "batch_size" in options:
        assert result.n_calls == 6
    energies, last = [], []
    for bead in "0123":
        positions, forces = frames(tmp_path, "positions", bead), frames(tmp_path, "forces", bead)
        mine = []
        for frame, force in zip(positions, forces, strict=True):
            atoms = Atoms(start.numbers, frame.positions, calculator=reference())
            mine.append(atoms.get_potential_energy())
            np.testing.assert_allclose(force.get_forces(), atoms.get_forces(), atol=1e-5)
        energies.append(mine)
        last.append(positions[-1].positions)
    assert np.ptp(last, axis=0).max() > 1e-3  # the beads are not one another
    potential_energy = np.loadtxt(tmp_path / "out.properties")[:, 1] * units.Hartree
    np.testing.assert_allclose(np.mean(energies, axis=0), potential_energy, atol=1e-5)


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_serves_a_backbone_and_says_what_it_did(tmp_path: Path, name: str) -> None:
    write(file := tmp_path / "ethanol.xyz", boxed())
    output: list[Any] = []
    thread = threading.Thread(
        target=lambda: output.append(mmea("serve", "mmea-organic-s", file, "--unix", name, "--dtype", "float64"))
    )
    with SocketIOCalculator(unixsocket=name, timeout=SECONDS) as calculator:
        atoms = boxed()
        atoms.calc = calculator
        thread.start()
        forces = atoms.get_forces()
    thread.join(SECONDS)
    (result,) = output
    assert result.exit_code == 0, result.output
    assert np.isfinite(forces).all()
    assert "9 atoms, C2H6O, not periodic; mmea-organic-s in float64 on cpu" in result.stderr
    assert "1 structures in 1 calls" in result.stderr


def test_a_broken_connection_is_an_exit_code(tmp_path: Path) -> None:
    write(file := tmp_path / "ethanol.xyz", boxed())
    with ThreadPoolExecutor(1) as pool, Peer() as peer:
        run = pool.submit(mmea, "serve", "mmea-organic-s", file, "--port", peer.address.target[1])
        (one,) = peer.accept()
        one.sendall(b"hello, are you there?")
        result = run.result(SECONDS)
    assert result.exit_code == 1
    assert "connection 1 ended: expected one of STATUS" in result.stderr


def test_wrong_usage_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    write(file := tmp_path / "ethanol.xyz", boxed())
    for options in ([], ["--port", "31415", "--unix", "x"]):
        result = mmea("serve", "mmea-organic-s", file, *options)
        assert result.exit_code == 2
        assert "--port or --unix" in result.stderr
    for arguments, message in (
        (["mmea-organic-s", tmp_path / "absent.xyz", "--port", "31415"], "no such file"),
        (["mmea-organic-s", file, "--port", "99999"], "port from 1 to 65535"),
        (["mmea-organic-s", file, "--port", free_port(), "--wait", "0"], "nobody answers at localhost"),
    ):
        result = mmea("serve", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr

"""Answers i-PI's requests for forces: `serve(potential, atoms, tcp("localhost", 31415))`.

In i-PI's protocol the simulation listens, and force engines connect to it, from as many hosts as one likes. One process
may hold several connections; the structures that have come in through all of them go through the network as one batch.
Nothing is shared between connections: one that brings what cannot be is ended, and the others go on.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from ase import Atoms

from ..errors import DataError, EngineError, MMEAError
from ..graph import Graph
from ..potential import Potential
from .protocol import Answer, Request, Session

Log = Callable[[str], None]

UNIX_PREFIX = "/tmp/ipi_"  # i-PI's <sockets_prefix>
# Silence of the other side in the middle of a message, or while it should fetch an answer, s.
PATIENCE_S = 60.0
# Beyond these no neighbour list is attempted, A and A^3 per atom: it would take all memory.
LARGEST_COORDINATE = 1e7
SMALLEST_VOLUME = 0.5
_CHUNK = 1 << 20
_PAUSE_S = 0.2  # between two attempts to connect


@dataclass(frozen=True)
class Address:
    """Where i-PI listens.

    Attributes:
        name: for messages.
        family: of the socket.
        target: (host, port), or the path of a unix socket.
    """

    name: str
    family: socket.AddressFamily
    target: tuple[str, int] | str


def tcp(host: str, port: int) -> Address:
    """i-PI's `<ffsocket mode="inet">` with this <address> and <port>. Raises EngineError for a port that cannot be."""
    if not 1 <= port <= 65535:
        raise EngineError(f"expected a port from 1 to 65535, got {port}")
    return Address(f"{host}:{port}", socket.AF_INET, (host, port))


def unix(name: str) -> Address:
    """i-PI's `<ffsocket mode="unix">` with this <address>: the file /tmp/ipi_NAME. A name with a / is a path."""
    path = name if "/" in name else UNIX_PREFIX + name
    return Address(path, socket.AF_UNIX, path)


@dataclass
class Served:
    """What was done.

    Attributes:
        n_structures: structures whose forces were sent.
        n_calls: of the network; smaller where structures came together.
        faults: one line for every connection that did not end well.
    """

    n_structures: int = 0
    n_calls: int = 0
    faults: list[str] = field(default_factory=list)


class Forces:
    """Energies, forces and virials of structures that share their species.

    Args:
        potential: backbone, with or without an adapter.
        atoms: species and periodic directions; its cell is not used.
        batch_size: structures per call of the network.
    """

    def __init__(self, potential: Potential, atoms: Atoms, batch_size: int) -> None:
        self.potential, self.atoms, self.batch_size = potential, atoms, batch_size

    def graphs(self, request: Request) -> list[Graph]:
        """Neighbour lists.

        Raises:
            DataError: a structure that cannot be: a cell without volume, or lengths that are no lengths of atoms.
        """
        numbers, pbc = self.atoms.numbers, self.atoms.pbc
        if (far := np.abs(request.positions).max()) > LARGEST_COORDINATE:
            raise DataError(f"expected coordinates up to {LARGEST_COORDINATE:g} A, got {far:g} A: are they in bohr?")
        if pbc.all() and (volume := np.abs(np.linalg.det(request.cells)).min()) < SMALLEST_VOLUME * len(numbers):
            raise DataError(
                f"expected a cell of at least {SMALLEST_VOLUME:g} A^3 per atom, got {volume:g} A^3 for {len(numbers)} "
                "atoms: has the cell collapsed, or is it not in bohr?"
            )
        structures = zip(request.cells, request.positions, strict=True)
        return [self.potential.graph(Atoms(numbers, x, cell=cell, pbc=pbc)) for cell, x in structures]

    def __call__(self, graphs: Sequence[Graph]) -> tuple[Answer, int]:
        """Results in the order of the structures, and the number of calls of the network that they took."""
        energies, forces, virials = [], [], []
        starts = range(0, len(graphs), self.batch_size)
        for some in (graphs[i : i + self.batch_size] for i in starts):
            prediction = self.potential.predict(self.potential.collate(some), stress=True)
            assert prediction.forces is not None
            assert prediction.stress is not None
            volumes = np.array([abs(np.linalg.det(g.cell)) for g in some])[:, None, None]
            energies.append(prediction.energy.cpu().numpy())
            forces.append(prediction.forces.double().cpu().numpy().reshape(len(some), -1, 3))
            virials.append(-prediction.stress.double().cpu().numpy() * volumes)
        return Answer(np.concatenate(energies), np.concatenate(forces), np.concatenate(virials)), len(starts)


def serve(
    potential: Potential,
    atoms: Atoms,
    address: Address,
    *,
    connections: int = 1,
    wait_s: float = 60.0,
    batch_size: int = 64,
    log: Log = lambda line: None,
) -> Served:
    """Connect to i-PI and compute forces until it has no more to ask.

    Args:
        potential: backbone, with or without an adapter.
        atoms: species, in i-PI's order, and periodic directions; cells and positions come from i-PI.
        address: where i-PI listens: `tcp(...)` or `unix(...)`.
        connections: how many; i-PI gives each its own structure at a time.
        wait_s: how long to try when nobody listens yet.
        batch_size: structures per call of the network at most.
        log: told about connections, a line at a time.

    Returns:
        what was done. A connection that broke, or that brought what the protocol does not allow, is among its `faults`.

    Raises:
        DataError: a structure that this backbone cannot take.
        EngineError: numbers that make no sense; nobody listens there.
    """
    if connections < 1 or batch_size < 1:
        raise EngineError(f"expected at least 1, got {connections} connections and a batch size of {batch_size}")
    forces = Forces(potential, atoms, batch_size)
    with ExitStack() as stack:
        stack.enter_context(potential.folded())
        # The first call of a network is a slow one, and it shows now whether the structure can be computed at all.
        forces([potential.graph(atoms)])
        sockets = [stack.enter_context(_connect(address, wait_s)) for _ in range(connections)]
        log(f"connected to i-PI at {address.name}" + (f", {connections} times" if connections > 1 else ""))
        selector = stack.enter_context(selectors.DefaultSelector())
        served = Served()
        loop = _Loop(forces, selector, served, log)
        for number, one in enumerate(sockets, start=1):
            loop.add(_Connection(number, one, Session(len(atoms))))
        loop.run()
    return served


def _connect(address: Address, wait_s: float) -> socket.socket:
    """A connected socket. Raises EngineError when there is none within `wait_s`."""
    end = time.monotonic() + wait_s
    while True:
        one = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            one.connect(address.target)
            if address.family == socket.AF_INET:
                if one.getsockname() == one.getpeername():
                    # With nobody there, TCP may connect a socket to itself.
                    raise ConnectionRefusedError("nobody listens")
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # Between two steps i-PI may be silent for hours; this tells silence from a host that is gone.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            one.setblocking(False)
            return one
        except OSError as problem:
            one.close()
            not_yet = isinstance(problem, ConnectionRefusedError | FileNotFoundError | TimeoutError)
            if not not_yet or time.monotonic() >= end:
                raise EngineError(
                    f"nobody answers at {address.name} ({problem.strerror or problem}): expected i-PI to listen there; "
                    "start it, and give what its <ffsocket> says"
                ) from problem
        time.sleep(_PAUSE_S)


@dataclass
class _Connection:
    number: int
    socket: socket.socket
    session: Session
    outgoing: bytearray = field(default_factory=bytearray)
    last_sign: float = field(default_factory=time.monotonic)

    @property
    def asks(self) -> bool:
        """Whether there is something to compute."""
        return self.session.request is not None

    @property
    def owed(self) -> bool:
        """Whether the other side should act at once: send the rest of a message, or take an answer."""
        return not self.asks and bool(self.outgoing or self.session.n_unread)


class _Loop:
    """All connections, in one thread: read what has come, compute what is asked for, send."""

    def __init__(self, forces: Forces, selector: selectors.BaseSelector, served: Served, log: Log) -> None:
        self.forces, self.selector, self.served, self.log = forces, selector, served, log
        self.connections: list[_Connection] = []

    def add(self, connection: _Connection) -> None:
        self.connections.append(connection)
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)

    def run(self) -> None:
        """Until the last connection has ended."""
        n_before = 0
        while self.connections:
            asking = [c for c in self.connections if c.asks]
            # One more look before each call of the network: structures that come together are computed together.
            if asking and len(asking) == n_before:
                self._compute(asking)
                n_before = 0
                continue
            n_before = len(asking)
            for key, _ in self.selector.select(0.0 if asking else self._longest_wait()):
                self._guarded(key.data, self._talk)
            self._give_up_on_silence()

    def _longest_wait(self) -> float | None:
        signs = [c.last_sign for c in self.connections if c.owed]
        return max(0.0, min(signs) + PATIENCE_S - time.monotonic()) if signs else None

    def _give_up_on_silence(self) -> None:
        now = time.monotonic()
        for connection in [c for c in self.connections if c.owed and now - c.last_sign > PATIENCE_S]:
            what = "has not taken its answer" if connection.outgoing else "stopped in the middle of a message"
            self._end(connection, f"the other side {what} for {PATIENCE_S:g} s")

    def _guarded(self, connection: _Connection, action: Callable[[_Connection], None]) -> None:
        """Whatever goes wrong with a connection ends this one alone."""
        try:
            action(connection)
        except MMEAError as problem:
            self._end(connection, str(problem))
        except OSError as problem:
            self._end(connection, f"the connection broke: {problem.strerror or problem}")

    def _talk(self, connection: _Connection) -> None:
        if connection.outgoing:
            self._send(connection)
            return
        try:
            data = connection.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        connection.last_sign = time.monotonic()
        if data:
            connection.outgoing += connection.session.receive(data)
            self._send(connection)
        elif connection.session.state in ("needs init", "ready") and not connection.session.n_unread:
            self._end(connection)  # ASE's calculator, and an i-PI that is stopped, leave without EXIT
        else:
            raise EngineError("the other side left in the middle of a request")

    def _send(self, connection: _Connection) -> None:
        """Send what there is to send; then wait for what is next."""
        try:
            while connection.outgoing:
                del connection.outgoing[: connection.socket.send(connection.outgoing)]
                connection.last_sign = time.monotonic()
        except BlockingIOError:
            self._wait_for(connection, selectors.EVENT_WRITE)
            return
        if connection.session.state == "finished":
            self._end(connection)
        else:
            # Nothing is read while there is work to do: no buffer grows beyond a message.
            self._wait_for(connection, 0 if connection.asks else selectors.EVENT_READ)

    def _wait_for(self, connection: _Connection, events: int) -> None:
        if connection.socket in self.selector.get_map():
            self.selector.unregister(connection.socket)
        if events:
            self.selector.register(connection.socket, events, connection)

    def _compute(self, connections: Sequence[_Connection]) -> None:
        """Forces for all of these connections' requests, and the answers."""
        asked: list[tuple[_Connection, list[Graph]]] = []

        def prepare(connection: _Connection) -> None:
            assert connection.session.request is not None
            asked.append((connection, self.forces.graphs(connection.session.request)))

        for connection in connections:
            self._guarded(connection, prepare)
        if not asked:
            return
        answer, n_calls = self.forces([graph for _, graphs in asked for graph in graphs])
        self.served.n_calls += n_calls
        end = 0
        for connection, graphs in asked:
            start, end = end, end + len(graphs)
            own = Answer(answer.energies[start:end], answer.forces[start:end], answer.virials[start:end])

            def reply(connection: _Connection, own: Answer = own) -> None:
                connection.last_sign = time.monotonic()
                connection.outgoing += connection.session.answer(own)
                self.served.n_structures += len(own.energies)
                self._send(connection)

            self._guarded(connection, reply)

    def _end(self, connection: _Connection, fault: str | None = None) -> None:
        self._wait_for(connection, 0)
        self.connections.remove(connection)
        connection.socket.close()
        name = f"connection {connection.number}"
        if fault is not None:
            self.served.faults.append(f"{name}: {fault}")
        self.log(f"{name} ended: {fault or 'i-PI has no more requests'}")

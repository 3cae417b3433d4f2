"""The force engine's side of i-PI's socket protocol: bytes in, bytes out, no sockets.

Source: Ceriotti, More, Manolopoulos, Comput. Phys. Commun. 185, 1019 (2014); Kapil et al., Comput. Phys. Commun. 236,
214 (2019); ASE's `SocketIOCalculator` speaks the same. A message begins with its name in 12 characters. Integers have
4 bytes, other numbers 8, in the machine's own order; lengths are in bohr, energies in hartree.

    i-PI sends                                                       answer
    STATUS                                                           NEEDINIT, READY or HAVEDATA
    INIT      bead, length, text                                     none
    POSDATA   h (3, 3), inverse (3, 3), n_atoms, positions           none
    GETFORCE                                                         FORCEREADY, energy, n_atoms, forces, virial (3, 3),
                                                                     length of a further text: 0
    EXIT                                                             none

`batch_size:N` in the text of INIT (i-PI 3.3) says that every POSDATA brings N structures: n_atoms, N times h and
inverse, N times positions; answered by N energies, n_atoms, N times forces, N virials, N zeros.

Columns of h are the lattice vectors. The virial is -dE/d(strain), which is -volume times the stress in ASE's sign.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ase import units
from numpy.typing import NDArray

from ..errors import EngineError

FloatArray = NDArray[np.float64]
State = Literal["needs init", "ready", "computing", "has data", "finished"]

HEADER = 12
NAMES = ("STATUS", "INIT", "POSDATA", "GETFORCE", "EXIT")
# What a peer may ask for; beyond it is no simulation, but a stream out of step.
LONGEST_INIT = 65536
LARGEST_BATCH = 4096
# Where i-PI's mode "shm" announces the memory that it shares, it expects no lengths in the stream.
_SHARED_MEMORY = b"ipi_shm_"
_BATCH_SIZE = re.compile(r"(?:^|,)\s*batch_size\s*:([^,]*)")
_ANSWERS: dict[State, str] = {"needs init": "NEEDINIT", "ready": "READY", "has data": "HAVEDATA"}


@dataclass(frozen=True)
class Request:
    """Structures whose forces are asked for.

    Attributes:
        cells: rows are lattice vectors, (n_structures, 3, 3), A.
        positions: (n_structures, n_atoms, 3), A.
    """

    cells: FloatArray
    positions: FloatArray


@dataclass(frozen=True)
class Answer:
    """What is sent back.

    Attributes:
        energies: (n_structures,), eV.
        forces: (n_structures, n_atoms, 3), eV/A.
        virials: -dE/d(strain), (n_structures, 3, 3), eV.
    """

    energies: FloatArray
    forces: FloatArray
    virials: FloatArray


class Session:
    """One connection: gathers what comes, answers what can be answered at once, and holds the request to compute.

    Args:
        n_atoms: atoms of every structure.

    Attributes:
        state: where the conversation is.
        request: what to compute; while there is one, nothing further is read from the stream.
    """

    def __init__(self, n_atoms: int) -> None:
        self.n_atoms = n_atoms
        self.state: State = "needs init"
        self.request: Request | None = None
        self._answer: Answer | None = None
        self._batch_size = 1
        self._buffer = bytearray()

    @property
    def n_unread(self) -> int:
        """Bytes of a message that is not complete yet."""
        return len(self._buffer)

    def receive(self, data: bytes) -> bytes:
        """Take in what came through the connection; returns what to send back, which may be nothing.

        Raises:
            EngineError: a message that the protocol does not have, does not allow here, or whose content cannot be:
                unknown names, lengths out of bounds, another number of atoms, numbers that are not finite.
        """
        self._buffer += data
        replies = bytearray()
        while self.state not in ("computing", "finished"):
            reply = self._next_message()
            if reply is None:
                break
            replies += reply
        return bytes(replies)

    def answer(self, answer: Answer) -> bytes:
        """Give the results for `request`; returns what to send back, as `receive` does, and raises as it does.

        Raises:
            EngineError: the results are not finite. The other side could not make sense of them.
        """
        for name in ("energies", "forces", "virials"):
            if not np.isfinite(getattr(answer, name)).all():
                raise EngineError(f"the network's {name} are not finite for the positions that were sent")
        self.request, self._answer, self.state = None, answer, "has data"
        return self.receive(b"")

    # -- messages ------------------------------------------------------------------------------------------------

    def _next_message(self) -> bytes | None:
        """Handle the message at the front of the buffer, if it is complete: its reply, else None."""
        if len(self._buffer) < HEADER:
            return None
        header = bytes(self._buffer[:HEADER])
        name = header.decode("ascii", errors="replace").rstrip(" ")
        if name not in NAMES or _header(name) != header:
            raise EngineError(f"expected one of {', '.join(NAMES)}, got {header!r}")
        if name == "INIT":
            return self._init()
        if name == "POSDATA":
            return self._posdata()
        del self._buffer[:HEADER]
        if name == "EXIT":
            self.state = "finished"
            return b""
        if name == "STATUS":
            return _header(_ANSWERS[self.state])
        return self._getforce()

    def _init(self) -> bytes | None:
        self._expect("INIT", "needs init", "ready")
        if len(self._buffer) < HEADER + 8:
            return None
        length = self._integer(HEADER + 4)
        if not 0 <= length <= LONGEST_INIT:
            raise EngineError(f"expected an INIT with a text of up to {LONGEST_INIT} bytes, got {length}")
        if len(self._buffer) < HEADER + 8 + length:
            return None
        text = bytes(self._buffer[HEADER + 8 : HEADER + 8 + length]).decode("utf-8", errors="replace")
        batch = _BATCH_SIZE.search(text)
        value = batch[1].strip() if batch else "1"
        if not re.fullmatch("[0-9]{1,9}", value) or not 1 <= int(value) <= LARGEST_BATCH:
            raise EngineError(f"expected an INIT with a batch_size of 1 to {LARGEST_BATCH}, got {value[:40]!r}")
        self._batch_size = int(value)
        del self._buffer[: HEADER + 8 + length]
        self.state = "ready"
        return b""

    def _posdata(self) -> bytes | None:
        # Some drivers send positions without ever sending INIT.
        self._expect("POSDATA", "needs init", "ready")
        if bytes(self._buffer[HEADER + 8 : HEADER + 16]) == _SHARED_MEMORY:
            raise EngineError("i-PI shares its memory, which mmea does not: give its <ffsocket> mode='unix' or 'inet'")
        n, cells_size = self._batch_size, self._batch_size * 144
        where = HEADER if n > 1 else HEADER + cells_size  # of the number of atoms
        if len(self._buffer) < where + 4:
            return None
        n_atoms = self._integer(where)
        if n_atoms != self.n_atoms:
            raise EngineError(
                f"expected POSDATA of {self.n_atoms} atoms, as the structure file has, got {n_atoms}: mmea serve needs "
                "the structure that is simulated"
            )
        size = HEADER + 4 + cells_size + n * n_atoms * 24
        if len(self._buffer) < size:
            return None
        numbers = np.frombuffer(bytes(self._buffer[HEADER:where] + self._buffer[where + 4 : size]), dtype=np.float64)
        if not np.isfinite(numbers).all():
            raise EngineError(f"POSDATA has {np.count_nonzero(~np.isfinite(numbers))} numbers that are not finite")
        cells, positions = numbers[: n * 18].reshape(n, 2, 3, 3), numbers[n * 18 :].reshape(n, n_atoms, 3)
        # The inverse says nothing new, and ASE sends it transposed.
        self.request = Request(cells[:, 0].transpose(0, 2, 1) * units.Bohr, positions * units.Bohr)
        del self._buffer[:size]
        self.state = "computing"
        return b""

    def _getforce(self) -> bytes:
        self._expect("GETFORCE", "has data")
        answer, n = self._answer, self._batch_size
        assert answer is not None
        numbers = (
            answer.energies / units.Ha,
            np.int32(self.n_atoms),
            answer.forces / (units.Ha / units.Bohr),
            answer.virials.transpose(0, 2, 1) / units.Ha,
            np.zeros(n, dtype=np.int32),
        )
        self._answer, self.state = None, "ready"
        return _header("FORCEREADY") + b"".join(np.ascontiguousarray(part).tobytes() for part in numbers)

    def _expect(self, message: str, *states: State) -> None:
        if self.state not in states:
            raise EngineError(f"{message} came when this side {_SAYS[self.state]}")

    def _integer(self, at: int) -> int:
        return int(np.frombuffer(bytes(self._buffer[at : at + 4]), dtype=np.int32)[0])


_SAYS: dict[State, str] = {
    "needs init": "has no positions to compute",
    "ready": "has no positions to compute",
    "has data": "has forces that were not fetched",
}


def _header(name: str) -> bytes:
    return name.encode("ascii").ljust(HEADER)

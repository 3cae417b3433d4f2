"""i-PI's protocol, byte for byte: what is answered, and what ends a conversation."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from ase import units

from mmea_calc.errors import EngineError
from mmea_calc.ipi.protocol import LARGEST_BATCH, LONGEST_INIT, Answer, Session

# Rows are lattice vectors, A; no two entries alike, so that a transposition shows.
CELL = np.array([[10.0, 0.5, 0.25], [1.0, 11.0, 0.75], [2.0, 3.0, 12.0]])
POSITIONS = np.array([[0.1, 0.2, 0.3], [1.1, 1.2, -1.3]])
RESULT = Answer(np.array([-7.5]), np.arange(6.0).reshape(1, 2, 3), np.arange(9.0).reshape(1, 3, 3))


def word(name: str) -> bytes:
    return f"{name:<12}".encode()


def init(text: str = " ", bead: int = 0) -> bytes:
    return word("INIT") + struct.pack("=ii", bead, len(text)) + text.encode()


def h(cell: np.ndarray) -> list[float]:
    """h and its inverse as i-PI sends them: lattice vectors are columns, bohr."""
    matrix = cell.T / units.Bohr
    return [*matrix.ravel(), *np.linalg.inv(matrix).ravel()]


def posdata(cell: np.ndarray = CELL, positions: np.ndarray = POSITIONS, n_atoms: int | None = None) -> bytes:
    x = (positions / units.Bohr).ravel()
    count = struct.pack("=i", len(positions) if n_atoms is None else n_atoms)
    return word("POSDATA") + struct.pack("=18d", *h(cell)) + count + struct.pack(f"={len(x)}d", *x)


def bytewise(session: Session, stream: bytes) -> None:
    for i in range(len(stream)):
        session.receive(stream[i : i + 1])


def test_a_conversation_as_the_protocol_has_it() -> None:
    session = Session(2)
    assert session.receive(word("STATUS")) == word("NEEDINIT")
    assert session.receive(init()) == b""
    assert session.receive(word("STATUS")) == word("READY")
    assert session.receive(posdata()) == b""
    assert session.request is not None
    np.testing.assert_allclose(session.request.cells, [CELL], rtol=1e-15)
    np.testing.assert_allclose(session.request.positions, [POSITIONS], rtol=1e-15)
    assert session.answer(RESULT) == b""
    assert session.receive(word("STATUS")) == word("HAVEDATA")
    assert session.receive(word("GETFORCE")).startswith(word("FORCEREADY"))
    assert session.receive(word("STATUS")) == word("READY")
    assert session.receive(word("EXIT")) == b""
    assert session.state == "finished"


def test_the_answer_has_the_numbers_of_the_protocol_in_its_units() -> None:
    session = Session(2)
    session.receive(init() + posdata() + word("GETFORCE"))
    reply = session.answer(RESULT)
    assert reply[:12] == b"FORCEREADY  "
    energy, n_atoms, *rest = struct.unpack("=di6d9di", reply[12:])
    assert energy == pytest.approx(-7.5 / 27.211386, rel=1e-7)
    assert n_atoms == 2
    np.testing.assert_allclose(rest[:6], np.arange(6.0) * 0.52917721 / 27.211386, rtol=1e-7)
    np.testing.assert_allclose(rest[6:15], np.arange(9.0).reshape(3, 3).T.ravel() / 27.211386, rtol=1e-7)
    assert rest[15] == 0


def test_messages_may_come_in_any_pieces() -> None:
    stream = word("STATUS") + init("x" * 30) + word("STATUS") + posdata() + word("STATUS") + word("GETFORCE")
    whole = Session(2)
    expected = whole.receive(stream)
    expected += whole.answer(RESULT)
    for size in (1, 7, 13, 100):
        session, replies = Session(2), b""
        for i in range(0, len(stream), size):
            replies += session.receive(stream[i : i + size])
            if session.request is not None:
                replies += session.answer(RESULT)
        assert replies == expected
    assert expected.startswith(word("NEEDINIT") + word("READY") + word("HAVEDATA") + word("FORCEREADY"))


def test_nothing_is_answered_while_forces_are_computed() -> None:
    session = Session(2)
    session.receive(init() + posdata())
    assert session.receive(word("STATUS")) == b""
    assert session.answer(RESULT) == word("HAVEDATA")


def test_positions_are_taken_without_an_init_too() -> None:
    session = Session(2)
    assert session.receive(posdata()) == b""
    assert session.request is not None


def test_a_batch_that_init_announces_comes_and_goes_as_one() -> None:
    session = Session(2)
    session.receive(init("key : value, batch_size:3"))
    cells = [CELL, 2 * CELL, 3 * CELL]
    positions = np.stack([POSITIONS, POSITIONS + 1, POSITIONS + 2])
    message = word("POSDATA") + struct.pack("=i", 2)
    message += b"".join(struct.pack("=18d", *h(cell)) for cell in cells)
    message += (positions / units.Bohr).tobytes() + word("GETFORCE")
    assert session.receive(message) == b""
    assert session.request is not None
    np.testing.assert_allclose(session.request.cells, cells, rtol=1e-15)
    np.testing.assert_allclose(session.request.positions, positions, rtol=1e-15)
    result = Answer(np.array([1.0, 2.0, 3.0]), np.arange(18.0).reshape(3, 2, 3), np.arange(27.0).reshape(3, 3, 3))
    reply = session.answer(result)
    assert reply[:12] == word("FORCEREADY")
    np.testing.assert_allclose(struct.unpack("=3d", reply[12:36]), [1 / 27.211386, 2 / 27.211386, 3 / 27.211386], 1e-7)
    assert reply[36:40] == struct.pack("=i", 2)
    numbers = np.frombuffer(reply[40 : 40 + 8 * 45])
    np.testing.assert_allclose(numbers[:18], np.arange(18.0) * units.Bohr / units.Hartree, rtol=1e-14)
    virials = numbers[18:].reshape(3, 3, 3).transpose(0, 2, 1)
    np.testing.assert_allclose(virials.ravel(), np.arange(27.0) / units.Hartree, rtol=1e-14)
    assert reply[400:] == struct.pack("=3i", 0, 0, 0)


def test_a_new_init_ends_a_batch() -> None:
    session = Session(2)
    session.receive(init("batch_size:3") + init("nothing") + posdata())
    assert session.request is not None
    assert session.request.positions.shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"GET / HTTP/1.1\r\n", "expected one of STATUS"),
        (b"status      ", "expected one of STATUS"),
        (b"STATUS\0\0\0\0\0\0", "expected one of STATUS"),
        (b"\xff" * 12, "expected one of STATUS"),
        (b" " * 12, "expected one of STATUS"),
        (word("READY"), "expected one of STATUS"),
        (word("FORCEREADY"), "expected one of STATUS"),
        (word("GETFORCE"), "GETFORCE came when this side has no positions"),
        (init() + word("GETFORCE"), "GETFORCE came when this side has no positions"),
        (word("INIT") + struct.pack("=ii", 0, -1), "got -1"),
        (word("INIT") + struct.pack("=ii", 0, LONGEST_INIT + 1), f"got {LONGEST_INIT + 1}"),
        (init("batch_size:0"), "batch_size of 1 to"),
        (init("batch_size:-4"), "batch_size of 1 to"),
        (init(f"batch_size:{LARGEST_BATCH + 1}"), "batch_size of 1 to"),
        (init("batch_size:" + "9" * 5000), "batch_size of 1 to"),
        (init("batch_size:four"), "batch_size of 1 to"),
        (posdata(n_atoms=3)[:160], "expected POSDATA of 2 atoms.* got 3"),
        (posdata(n_atoms=0)[:160], "got 0"),
        (posdata(n_atoms=-1)[:160], "got -1"),
        (posdata(n_atoms=2**31 - 1)[:160], "got 2147483647"),
        (init("batch_size:4") + word("POSDATA") + struct.pack("=i", 9), "got 9"),
        (posdata(positions=np.array([[0, 0, np.nan], [0, 0, 1]])), "1 numbers that are not finite"),
        (posdata(positions=np.array([[0, 0, np.inf], [0, -np.inf, 1]])), "2 numbers that are not finite"),
        (posdata()[:12] + struct.pack("=d", np.nan) + posdata()[20:], "1 numbers that are not finite"),
        (word("POSDATA") + struct.pack("=ii", 2, 18) + b"ipi_shm_123_45_pos", "mode='unix' or 'inet'"),
    ],
)
def test_what_cannot_be_is_refused(stream: bytes, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Session(2).receive(stream)
    with pytest.raises(EngineError, match=message):
        bytewise(Session(2), stream)


@pytest.mark.parametrize("stream", [posdata(), init()])
def test_forces_that_were_not_fetched_are_not_passed_over(stream: bytes) -> None:
    session = Session(2)
    session.receive(posdata())
    session.answer(RESULT)
    with pytest.raises(EngineError, match="has forces that were not fetched"):
        session.receive(stream)


@pytest.mark.parametrize("name", ["energies", "forces", "virials"])
def test_results_that_are_not_finite_are_not_sent(name: str) -> None:
    values = {k: getattr(RESULT, k).copy() for k in ("energies", "forces", "virials")}
    values[name].flat[0] = np.nan
    session = Session(2)
    session.receive(posdata() + word("GETFORCE"))
    with pytest.raises(EngineError, match=f"network's {name} are not finite"):
        session.answer(Answer(**values))

"""Normal random numbers without a state: a function of seed, replica, step and atom.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11, doi:10.1145/2063384.2063405) turns a counter of four 32-bit words
and a key of two into four random words. A replica's key comes from the seed and from what the replica is, never from
its place in the batch, so its noise does not depend on who else is there; and a run is resumed by knowing its step.

Two words make two normal numbers (Box and Muller, 1958): with u = (word + 1/2) / 2^32,

    sqrt(-2 ln u1) cos(2 pi u2),   sqrt(-2 ln u1) sin(2 pi u2).

The largest is 6.8 standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

# last word of the counter: what the numbers are for
THERMOSTAT, VELOCITIES = 0, 1

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Steps made at once: on small systems the calls cost more than the arithmetic.
_BLOCK = 16


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Four random 32-bit words for every counter.

    Args:
        counter: four int64 tensors of 32-bit words; they broadcast.
        key: two of the same.

    Returns:
        four int64 tensors of words.
    """
    c0, c1, c2, c3, k0, k1 = torch.broadcast_tensors(*counter, *key)
    even, odd, keys = torch.stack([c0, c2]), torch.stack([c1, c3]), torch.stack([k0, k1])
    # made where they are needed: nothing waits for the host, and all of this can be recorded
    multipliers, weyl = (torch.stack([c0.new_full([1] * c0.dim(), n) for n in pair]) for pair in (_MULTIPLIERS, _WEYL))
    for _ in range(_ROUNDS):
        # Each product serves the other pair. int64 wraps around, which leaves all 64 bits of the product right.
        product = even * multipliers
        even, odd = (product >> 32 & _WORD).flip(0) ^ odd ^ keys, (product & _WORD).flip(0)
        keys = keys + weyl & _WORD
    return [even[0], odd[0], even[1], odd[1]]


def replica_key(seed: int, identity: str) -> tuple[int, int]:
    """Two 32-bit words for a replica of this name in a run of this seed."""
    digest = blake2b(f"{seed}/{identity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


class Noise:
    """Normal numbers for the atoms of a batch of replicas.

    Args:
        seed: of the run.
        identities: name of every replica, unique.
        atoms_per_replica: (n_replicas,).
        device: of the results.
    """

    def __init__(
        self, seed: int, identities: Sequence[str], atoms_per_replica: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        keys = torch.tensor([replica_key(seed, name) for name in identities], dtype=torch.int64)
        counts = torch.tensor(list(atoms_per_replica))
        self._key = keys.repeat_interleave(counts, dim=0).T.to(device)  # (2, n_atoms)
        self._atom = torch.cat([torch.arange(n) for n in atoms_per_replica]).to(device)
        self._kept: dict[int, tuple[int, Tensor]] = {}

    def normals(self, step: int | Tensor, stream: int = THERMOSTAT) -> Tensor:
        """Standard normal numbers of this step, (n_atoms, 3), float64; (n, n_atoms, 3) of n steps, (n,), int64."""
        if isinstance(step, Tensor):
            return self._make(step, stream)
        block = step // _BLOCK
        if stream not in self._kept or self._kept[stream][0] != block:
            first = block * _BLOCK
            steps = torch.arange(first, first + _BLOCK, device=self._atom.device)
            self._kept[stream] = (block, self._make(steps, stream))
        return self._kept[stream][1][step % _BLOCK]

    def _make(self, steps: Tensor, stream: int) -> Tensor:
        steps = steps[:, None]
        last = torch.full_like(steps, stream)
        words = philox((steps & _WORD, steps >> 32, self._atom[None], last), (self._key[0], self._key[1]))
        u = [(word.double() + 0.5) / 2.0**32 for word in words]
        r1, r2 = torch.sqrt(-2 * torch.log(u[0])), torch.sqrt(-2 * torch.log(u[2]))
        angle = 2 * math.pi * u[1]
        return torch.stack([r1 * torch.cos(angle), r1 * torch.sin(angle), r2 * torch.cos(2 * math.pi * u[3])], dim=-1)

"""SOAP: Adam in the eigenbases of Shampoo's preconditioners (arXiv 2409.11321), for all matrices of one shape at once.

Of a gradient G (rows, columns) running means of G G^T and G^T G are kept. Their eigenvectors L, R are the basis in
which Adam works: it sees L^T G R, and its step S becomes L S R^T. Bases are renewed every tenth step, those of long
axes more rarely, by one power iteration and a QR decomposition. Tensors with more axes, such as elements x paths x
channels, have a basis for each of them; vectors have none and are left to Adam, and so is an axis of very many entries.

An adapter consists of many small matrices of few shapes. One operation for all of a shape, instead of one for each, is
what makes a step short: on a GPU starting an operation takes longer than any of these does, on a CPU as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from operator import is_
from typing import Any

import torch
from torch import Tensor

FREQUENCY = 10  # steps between renewals of the bases
# A renewal takes a time that grows with the third power of the entries: axes of more than `LONG` have one in five, and
# those of more than `LARGEST` no basis at all.
LONG, RARELY, LARGEST = 256, 5 * FREQUENCY, 2048


class SOAP(torch.optim.Optimizer):
    """One step with the gradients that are there, for `torch.optim`'s schedulers and checkpoints as any other.

    Args:
        params: tensors, or groups of them. A group may have `shapes`: for every tensor those of the matrices that it
            consists of, in memory order; else each tensor is one.
        lr: learning rate.
        betas: decays of the running means of gradients and of their squares; the second one of the preconditioners too.
        weight_decay: decoupled, p <- p - lr weight_decay p.
        eps: added to the root of the squares.

    The first step makes the bases and changes nothing else.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, shapes=None, steps=0))
        self._stacks: dict[int, tuple[list[Tensor], list[_Stack]]] = {}
        self._n_stacked = 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all parameters that have a gradient."""
        self.begin()
        self.change({p: p.grad for group in self.param_groups for p in group["params"]}, self.numbers())
        self.end()

    # A step in three parts, so that the second, which every step takes in the same way, can be recorded.

    @torch.no_grad()
    def begin(self) -> None:
        """What comes before `change` where it is needed: tensors take part that did not, or no longer; first bases."""
        for number, group in enumerate(self.param_groups):
            parameters = [p for p in group["params"] if p.grad is not None]
            before, stacks = self._stacks.get(number, ([], []))
            if number not in self._stacks or not _same(parameters, before):
                stacks = self._stacked(group, parameters)
                self._stacks[number] = (parameters, stacks)
                self._n_stacked += 1
            for stack in stacks:
                stack.begin(group)

    def layout(self) -> tuple[object, ...]:
        """After `begin`: equal as long as `change` takes the same operations with the same tensors."""
        return self._n_stacked, *((g["steps"] > 0, g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups)

    def changed(self) -> list[Tensor]:
        """All that `change` changes."""
        found: list[Tensor] = []
        for parameters, stacks in self._stacks.values():
            found += [*parameters, *(t for stack in stacks for t in stack.changed())]
        return found

    def numbers(self) -> list[float]:
        """What differs from step to step: of every group its rate, and what weight decay multiplies by."""
        return [number for group in self.param_groups for number in _numbers(group)]

    @torch.no_grad()
    def change(self, gradients: Mapping[Tensor, Tensor | None], numbers: Sequence[float | Tensor]) -> None:
        """Change all parameters that take part, and what is remembered of their gradients.

        Args:
            gradients: of the parameters.
            numbers: those of `numbers`, or tensors without dimensions that hold them, in the precision of parameters.
        """
        for number, (parameters, stacks) in self._stacks.items():
            group = self.param_groups[number]
            if group["steps"] == 0 or not parameters:
                continue
            rate, kept = numbers[2 * number : 2 * number + 2]
            for stack in stacks:
                stack.change(gradients, group, rate)
            if group["weight_decay"] != 0:
                torch._foreach_mul_(parameters, kept)

    @torch.no_grad()
    def end(self) -> None:
        """New bases where it is time for them."""
        for number, group in enumerate(self.param_groups):
            for stack in self._stacks[number][1]:
                stack.end(group["steps"])
            group["steps"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError for a state of another optimiser."""
        known = all(isinstance(of, dict) and set(of) == {"blocks"} for of in state_dict.get("state", {}).values())
        if not known or not all("steps" in group for group in state_dict["param_groups"]):
            raise ValueError("the state is not one of this optimiser")
        super().load_state_dict(state_dict)
        self._stacks = {}

    def _stacked(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> list[_Stack]:
        """The matrices of these parameters by shape, with the states that they have or zeros."""
        shapes = group["shapes"] or [[tuple(p.shape)] for p in group["params"]]
        of = dict(zip(group["params"], shapes, strict=True))
        kinds: dict[tuple[Any, ...], list[_Block]] = {}
        for p in parameters:
            blocks, start = self.state[p].setdefault("blocks", [{} for _ in of[p]]), 0
            for shape, state in zip(of[p], blocks, strict=True):
                block = _Block(p, start, tuple(shape), state)
                start += prod(shape)
                key = block.shape if len(shape) > 1 else ("vectors",)
                kinds.setdefault((*key, p.dtype, p.device), []).append(block)
            if start != p.numel():
                raise ValueError(f"shapes {of[p]} do not fill a tensor of {p.numel()} values")
        return [_Stack(blocks) for blocks in kinds.values()]


@dataclass(frozen=True)
class _Block:
    """A run of a parameter, seen as a matrix; one that is wider than high is taken on its side."""

    parameter: Tensor
    start: int
    own_shape: tuple[int, ...]
    state: dict[str, Any]

    @property
    def turned(self) -> bool:
        return len(self.own_shape) == 2 and self.own_shape[0] < self.own_shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.own_shape[::-1] if self.turned else self.own_shape

    def of(self, tensor: Tensor) -> Tensor:
        """The run in `tensor`, which has the parameter's shape; a view where it can be."""
        if tensor.shape == self.own_shape:
            return tensor
        return tensor.reshape(-1)[self.start : self.start + prod(self.own_shape)].view(self.own_shape)


class _Stack:
    """Blocks of one shape, (n, *shape), or all vectors as one, (1, total): what is kept of them, and their steps.

    The state of a block is views of it.
    """

    def __init__(self, blocks: Sequence[_Block]) -> None:
        # Turned ones last, so that each kind is one piece.
        self.blocks = [*(b for b in blocks if not b.turned), *(b for b in blocks if b.turned)]
        self.n_straight = sum(not b.turned for b in blocks)
        one = self.blocks[0]
        self.vectors = len(one.shape) < 2
        self.axes = () if self.vectors else one.shape
        self.mean, self.square = self._kept("mean"), self._kept("square")
        self.products = [self._kept_matrix("products", k, d) for k, d in enumerate(self.axes)]
        self.bases = [self._kept_matrix("bases", k, d) for k, d in enumerate(self.axes)]
        self.fresh = [i for i, b in enumerate(self.blocks) if self.axes and "bases" not in b.state]
        self._hand_out()

    # -- gathering -----------------------------------------------------------------------------------------------

    def _together(self, pieces: Sequence[Tensor]) -> Tensor:
        """Tensors in the blocks' own shapes -> (n, *shape)."""
        if self.vectors:
            return torch.cat([piece.reshape(-1) for piece in pieces])[None]
        kinds = (list(pieces[: self.n_straight]), list(pieces[self.n_straight :]))
        parts = [torch.stack(some) for some in kinds if some]
        if len(pieces) > self.n_straight:
            parts[-1] = parts[-1].transpose(1, 2)
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def _views(self, stacked: Tensor) -> list[Tensor]:
        """The inverse of `_together`, in the same memory."""
        if self.vectors:
            sizes = [prod(b.own_shape) for b in self.blocks]
            return [v.view(b.own_shape) for v, b in zip(stacked[0].split(sizes), self.blocks, strict=True)]
        return [piece.mT if b.turned else piece for piece, b in zip(stacked.unbind(0), self.blocks, strict=True)]

    def _apart(self, stacked: Tensor) -> list[Tensor]:
        """The same for operations on lists, which are quick where each tensor lies in one piece."""
        if self.vectors:
            return self._views(stacked)
        straight, turned = stacked[: self.n_straight], stacked[self.n_straight :]
        return [*straight.unbind(0), *(turned.transpose(1, 2).contiguous().unbind(0) if len(turned) else ())]

    def _kept(self, name: str) -> Tensor:
        """A state with the blocks' shape: what they have, zeros where they have none."""
        found = [b.state[name] if name in b.state else b.of(torch.zeros_like(b.parameter)) for b in self.blocks]
        return self._together(found)

    def _kept_matrix(self, name: str, k: int, d: int) -> Tensor | None:
        """A state (n, d, d) of axis k; None for one without a basis."""
        if d > LARGEST:
            return None
        p = self.blocks[0].parameter
        zeros = torch.zeros(d, d, dtype=p.dtype, device=p.device)
        return torch.stack([b.state[name][k] if name in b.state else zeros for b in self.blocks])

    def _hand_out(self) -> None:
        """Give every block its state as views of the stack's."""
        for name, stacked in (("mean", self.mean), ("square", self.square)):
            for block, view in zip(self.blocks, self._views(stacked), strict=True):
                block.state[name] = view
        for i, block in enumerate(self.blocks if self.axes else ()):
            for name, matrices in (("products", self.products), ("bases", self.bases)):
                block.state[name] = [None if m is None else m[i] for m in matrices]

    # -- stepping ------------------------------------------------------------------------------------------------

    def begin(self, group: dict[str, Any]) -> None:
        """First bases of blocks that have none."""
        if self.fresh:
            self._begin(self._gradient({b.parameter: b.parameter.grad for b in self.blocks}), group["betas"][1])

    def change(self, gradients: Mapping[Tensor, Tensor | None], group: dict[str, Any], rate: float | Tensor) -> None:
        """Change the blocks' parameters, and the running means."""
        gradient, (beta1, beta2) = self._gradient(gradients), group["betas"]
        seen = _turned(gradient, self.bases)
        self.mean.lerp_(seen, 1 - beta1)
        self.square.mul_(beta2).addcmul_(seen, seen, value=1 - beta2)
        change = self.mean / self.square.sqrt().add_(group["eps"])
        change = _turned(change, [None if basis is None else basis.mT for basis in self.bases])
        mine = [b.of(b.parameter) for b in self.blocks]
        if isinstance(rate, Tensor):  # which operations on lists do not take for `alpha`
            torch._foreach_sub_(mine, self._apart(change * rate))
        else:
            torch._foreach_add_(mine, self._apart(change), alpha=-rate)
        for k, product in enumerate(self.products):
            if product is not None:
                unfolded = gradient.movedim(k + 1, 1).flatten(2)
                product.baddbmm_(unfolded, unfolded.mT, beta=beta2, alpha=1 - beta2)

    def end(self, steps: int) -> None:
        """New bases, if that many steps before ask for it."""
        if self.axes and steps > 0 and steps % (FREQUENCY if max(self.axes) <= LONG else RARELY) == 0:
            self._renew()

    def changed(self) -> list[Tensor]:
        """All that `change` changes beside the parameters."""
        return [self.mean, self.square, *(product for product in self.products if product is not None)]

    def _gradient(self, gradients: Mapping[Tensor, Tensor | None]) -> Tensor:
        return self._together([b.of(gradients[b.parameter]) for b in self.blocks])  # type: ignore[arg-type]

    def _begin(self, gradient: Tensor, beta: float) -> None:
        """Preconditioners and bases of blocks that have none, of their first gradient."""
        rows = torch.tensor(self.fresh, device=gradient.device)
        for k, (products, bases) in enumerate(zip(self.products, self.bases, strict=True)):
            if products is not None and bases is not None:
                unfolded = gradient[rows].movedim(k + 1, 1).flatten(2)
                products[rows] = product = (1 - beta) * (unfolded @ unfolded.mT)
                bases[rows] = _eigenvectors(product)
        self.fresh = []

    def _renew(self) -> None:
        """Bases one power iteration on, largest eigenvalues first; the means are turned into them."""
        turns: list[Tensor | None] = []
        for k, (product, basis) in enumerate(zip(self.products, self.bases, strict=True)):
            if product is None or basis is None:
                turns.append(None)
                continue
            ahead = product @ basis
            order = (basis * ahead).sum(1).argsort(dim=1, descending=True)  # (n, d)
            along = order.view(len(order), *(-1 if j == k else 1 for j in range(len(self.axes))))
            self.square.copy_(self.square.take_along_dim(along, k + 1))
            new = torch.linalg.qr(ahead.take_along_dim(order[:, None], 2))[0]
            turns.append(basis.mT @ new)
            basis.copy_(new)
        self.mean.copy_(_turned(self.mean, turns))


def _numbers(group: dict[str, Any]) -> tuple[float, float]:
    """Rate of a group, with the corrections for means that have just begun; and what weight decay multiplies by."""
    steps, (beta1, beta2) = group["steps"], group["betas"]
    if steps == 0:
        return 0.0, 1.0
    rate = group["lr"] * sqrt(1 - beta2**steps) / (1 - beta1**steps)
    return rate, 1 - group["lr"] * group["weight_decay"]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _turned(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """x (n, d0, d1, ...) with its k-th axis multiplied by the k-th matrix (n, dk, dk), if there is one."""
    for matrix in matrices:
        shape = (len(x), *x.shape[2:], x.shape[1])
        x = x.flatten(2).mT
        x = (x if matrix is None else x @ matrix).reshape(shape)
    return x


def _eigenvectors(products: Tensor) -> Tensor:
    """Those of symmetric matrices (n, d, d) as columns, of the largest eigenvalue first."""
    try:
        return torch.linalg.eigh(products)[1].flip(-1)
    except torch.linalg.LinAlgError:  # many equal eigenvalues, as of a first gradient with few rows that are not zero
        return torch.linalg.eigh(products.double())[1].flip(-1).to(products)


__all__ = ["FREQUENCY", "SOAP"]

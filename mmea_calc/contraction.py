"""mace's symmetric contraction, with the coupling tensors contracted once per element instead of once per atom.

Stock (MACE, arXiv 2206.07697, eqs. 10-11), for one output component w and one channel c of an atom of element e:

    B_w = sum_xvi U3[w,x,v,i,k] W3[e,k,c] A_x A_v A_i
        + sum_xv U2[w,x,v,k] W2[e,k,c] A_x A_v + sum_x U1[w,x,k] W1[e,k,c] A_x

The products of U and W know nothing of the atom. With m = (A_x A_v for all x, v; A_x for all x; 1), the monomials of
degree below the correlation order, they are one matrix per element, channel and degree,

    B_w = sum_i A_i sum_q m_q T[e,c,q,(w,i)],

so a call is one batched matrix product per degree and element present. It is exact, and differentiable any number of
times. While the weights W are frozen the tables are constants and kept; while they train they are made anew in each
call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations_with_replacement, product
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from .arrangement import stage
from .mace_bridge import symmetric_contractions
from .tensor_state import State, same_state, state_of


def use_table_contraction(network: nn.Module) -> int:
    """Let every symmetric contraction of `network` use the table form. Parameters and their names stay.

    Returns:
        The number of contractions found (0 for a network that has none).
    """
    found = symmetric_contractions(network)
    for _, module in found:
        # On this instance alone; `remove_table_contraction` uncovers the class's own forward again. It is an object,
        # not a closure, so that a copy of the network gets a table form that reads the copy's weights.
        module.__dict__["forward"] = TableContraction(module)
    return len(found)


def remove_table_contraction(network: nn.Module) -> None:
    """Back to mace's own contraction."""
    for _, module in symmetric_contractions(network):
        module.__dict__.pop("forward", None)


class TableContraction:
    """The table form of one `mace.modules.symmetric_contraction.SymmetricContraction`.

    Args:
        stock: the module whose coupling tensors and weights are used; they are read at each call, so a
            parametrization or a change of weights is seen.
    """

    def __init__(self, stock: Any) -> None:
        self.contractions: list[Any] = list(stock.contractions)
        self.correlations: list[int] = [int(c.correlation) for c in self.contractions]
        self.n = int(self.contractions[0].U_tensors(1).shape[-2])  # components of the input per channel
        self.widths = [2 * ir.ir.l + 1 for ir in stock.irreps_out]
        self._kept: dict[int, list[Tensor]] = {}
        self._kept_for = State()
        self._grouped: tuple[Tensor, int, Tensor, dict[int, int], Tensor] | None = None
        self._sorted_couplings: list[list[Tensor]] | None = None
        self._sorted_for = State()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """As mace's: x (n_atoms, channels, n), one-hot y (n_atoms, n_elements) -> (n_atoms, channels * sum(2l+1))."""
        if now := stage():
            at = now.arrangement.atoms
            a = at.gather(x).transpose(1, 2).flatten(0, 1)
            out = self._contracted(a, now.tables[self], _next_sorted if now.compiled else _next_chosen)
            out = out.unflatten(0, (at.rows.shape[0], x.shape[1])).transpose(1, 2)  # (elements, atoms of each, c, w)
            out = at.scatter(out)
            return now.join([piece.flatten(1) for piece in out.split(self.widths, dim=-1)])
        order, counts, back = self._atoms_by_element(y)
        if not counts:  # no atoms
            return x.new_zeros(0, x.shape[1] * sum(self.widths))
        tables = self._tables(list(counts))
        sorted_x = x.index_select(0, order).transpose(0, 1)  # (c, atoms, n)
        parts = []
        for e, a in zip(counts, sorted_x.split(list(counts.values()), dim=1), strict=True):
            parts.append(self._contracted(a, tables[e], _next))
        out = torch.cat(parts, dim=1).transpose(0, 1)  # (atoms, c, w)
        out = out.index_select(0, back)
        return torch.cat([piece.flatten(1) for piece in out.split(self.widths, dim=-1)], dim=1)

    def _contracted(self, a: Tensor, tables: list[Tensor], monomials: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The module's last equation: (c, atoms, n) -> (c, atoms, w)."""
        *of_degree, out = tables
        m: Tensor | None = None
        for table in reversed(of_degree):  # of the lowest degree first
            m = a if m is None else monomials(m, a)
            out = torch.baddbmm(out, m, table)  # (c, atoms, w * n)
        return (out.unflatten(-1, (-1, self.n)) * a.unsqueeze(-2)).sum(-1)

    def tables_of(self, present: Tensor) -> list[Tensor]:
        """T of several elements for sorted monomials, each once, the highest degree first: (elements * c, q, w * n)."""
        if self.contractions[0].weights_max.shape[0] == 1:  # a contraction that makes no difference between elements
            present = torch.zeros_like(present)
        weights = [
            [w.index_select(0, present).transpose(1, 2).flatten(0, 1) for w in _weights(c)] for c in self.contractions
        ]
        tables = []
        for of_degree in self._couplings():  # (elements * c, k) times (k, q, w, n)
            parts = [
                (some.pop(0) @ u.flatten(1)).unflatten(1, u.shape[1:])
                if u.shape[0]
                else some[0].new_zeros(len(some[0]), *u.shape[1:])
                for some, u in zip(weights, of_degree, strict=True)
            ]
            tables.append(torch.cat(parts, dim=2).flatten(2))
        return tables

    def _couplings(self) -> list[list[Tensor]]:
        """For each degree, the highest first: U of every contraction for sorted monomials, (k, q, w, n).

        Its entries for monomials that are the same are summed. k is 0 where a contraction has no such degree.
        """
        own = [[c.U_tensors(k) for k in range(c.correlation, 0, -1)] for c in self.contractions]
        flat = [u for some in own for u in some]
        # Tensors of inference mode have no version, and what is made there could not enter a later gradient.
        if torch.is_inference_mode_enabled() or any(u.is_inference() for u in flat):
            return self._sorted(own)
        state = state_of(flat)
        if self._sorted_couplings is None or not same_state(state, self._sorted_for):
            with torch.no_grad():
                self._sorted_couplings, self._sorted_for = self._sorted(own), state
        return self._sorted_couplings

    def _sorted(self, own: list[list[Tensor]]) -> list[list[Tensor]]:
        found = []
        for k in range(max(self.correlations), 0, -1):
            all_of_them = list(product(range(self.n), repeat=k - 1))
            number = {m: i for i, m in enumerate(combinations_with_replacement(range(self.n), k - 1))}
            of_each = torch.tensor([number[tuple(sorted(m))] for m in all_of_them])
            of_degree = []
            for contraction, couplings, width in zip(self.contractions, own, self.widths, strict=True):
                if k > contraction.correlation:
                    of_degree.append(couplings[0].new_zeros(0, len(number), width, self.n))
                    continue
                u = couplings[contraction.correlation - k]
                u = u.reshape(width, len(all_of_them), self.n, u.shape[-1])
                summed = u.new_zeros(width, len(number), self.n, u.shape[-1])
                summed = summed.index_add(1, of_each.to(u.device), u)
                of_degree.append(summed.permute(3, 1, 0, 2).contiguous())
            found.append(of_degree)
        return found

    def _atoms_by_element(self, y: Tensor) -> tuple[Tensor, dict[int, int], Tensor]:
        """Atoms sorted by element, the number of each element present, and where each atom lies in that order.

        Kept for the one-hot tensor seen last: in dynamics it is the same one at every step.
        """
        # In inference mode changes of a tensor are not counted, and what is made there could not enter a gradient.
        version = -1 if y.is_inference() or torch.is_inference_mode_enabled() else y._version
        if self._grouped is None or self._grouped[0] is not y or self._grouped[1] != version or version < 0:
            element = y.argmax(dim=1)
            order = element.argsort(stable=True)
            found = torch.bincount(element, minlength=y.shape[1]).tolist()
            counts = {e: count for e, count in enumerate(found) if count}
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            self._grouped = (y, version, order, counts, back)
        return self._grouped[2:]

    def _tables(self, elements: list[int]) -> dict[int, list[Tensor]]:
        """Element -> T for the monomials of each degree, the highest one first: (c, n**degree, w * n)."""
        weights = [w for c in self.contractions for w in _weights(c)]
        couplings = [c.U_tensors(k) for c in self.contractions for k in (1, c.correlation)]
        # Tensors of inference mode have no version, and tables made there could not enter a later gradient.
        unkept = torch.is_inference_mode_enabled() or any(t.is_inference() for t in (*weights, *couplings))
        if unkept or any(w.requires_grad for w in weights):
            self._kept, self._kept_for = {}, State()
            return {e: self._one(e) for e in elements}
        state = state_of((*weights, *couplings))
        if not same_state(state, self._kept_for):
            self._kept, self._kept_for = {}, state
        for e in elements:
            if e not in self._kept:
                with torch.no_grad():
                    self._kept[e] = self._one(e)
        return self._kept

    def _one(self, element: int) -> list[Tensor]:
        return [table.squeeze(0) for table in self._table(slice(element, element + 1))]

    def _table(self, elements: Tensor | slice) -> list[Tensor]:
        highest = max(self.correlations)
        degrees: list[list[Tensor]] = [[] for _ in range(highest)]
        for contraction, width in zip(self.contractions, self.widths, strict=True):
            weights = dict(zip(range(contraction.correlation, 0, -1), _weights(contraction), strict=True))
            # U_k has k input components: k - 1 in the monomial, the last one apart
            for k, found in zip(range(highest, 0, -1), degrees, strict=True):
                if k > contraction.correlation:
                    chosen = weights[1][elements]
                    found.append(chosen.new_zeros(len(chosen), chosen.shape[-1], self.n ** (k - 1), width, self.n))
                    continue
                u = contraction.U_tensors(k)
                u = u.reshape(width, self.n ** (k - 1), self.n, u.shape[-1])
                found.append(torch.einsum("wqik,ekc->ecqwi", u, weights[k][elements]))
        return [torch.cat(found, dim=3).flatten(3) for found in degrees]

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: without the tables, which are made again."""
        kept: dict[str, object] = {"_kept": {}, "_kept_for": State(), "_sorted_couplings": None, "_sorted_for": State()}
        return {**self.__dict__, **kept, "_grouped": None}


def _next(monomials: Tensor, a: Tensor) -> Tensor:
    """Of one degree more: every monomial (..., q) times every component (..., n), in few operations."""
    return (monomials.unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2)


def _next_sorted(monomials: Tensor, a: Tensor) -> Tensor:
    """Of one degree more, each once: a_i times the monomials of components i and above, which stand at the end.

    More operations and half the products: for a compiled network, where operations cost nothing.
    """
    q = monomials.shape[-1]
    return torch.cat(
        [a[..., i : i + 1] * monomials[..., q - end :] for i, end in enumerate(_ends(a.shape[-1], q))], dim=-1
    )


def _next_chosen(monomials: Tensor, a: Tensor) -> Tensor:
    """The same in three operations, for what is recorded as it is."""
    components, numbers = _chosen(a.shape[-1], monomials.shape[-1], a.device)
    return a.index_select(-1, components) * monomials.index_select(-1, numbers)


@cache
def _chosen(n: int, q: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each product its component, and the number of its monomial."""
    pairs = [(i, number) for i, end in enumerate(_ends(n, q)) for number in range(q - end, q)]
    with torch.inference_mode(False):  # what is made within it could not enter a later gradient
        components, numbers = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
    return components, numbers


def _ends(n: int, q: int) -> list[int]:
    """How many of q sorted monomials of n components have none before i, for every i."""
    degree = next(d for d in range(1, 10) if comb(n + d - 1, d) == q)
    return [comb(n - i + degree - 1, degree) for i in range(n)]


def _weights(contraction: Any) -> list[Tensor]:
    """Of the highest correlation first."""
    return [contraction.weights_max, *contraction.weights]

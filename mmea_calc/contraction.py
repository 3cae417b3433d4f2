"""mace's symmetric contraction, with the coupling tensors contracted once per element instead of once per atom.

Stock (MACE, arXiv 2206.07697, eqs. 10-11), for one output component w and one channel c of an atom of element e:

    B_w = sum_xvi U3[w,x,v,i,k] W3[e,k,c] A_x A_v A_i + sum_xv U2[w,x,v,k] W2[e,k,c] A_x A_v + sum_x U1[w,x,k] W1[e,k,c] A_x

The bracket of U and W knows nothing of the atom. With m = (A_x A_v for all x, v; A_x for all x; 1), the monomials
of degree below the correlation order, it is one matrix per element and channel,

    B_w = sum_i A_i sum_q m_q T[e,c,q,(w,i)],

so a call is one batched matrix product per element present. It is exact, and differentiable any number of times.
While the weights W are frozen the tables are constants and kept; while they train they are made anew in each call.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from .mace_bridge import symmetric_contractions


def use_table_contraction(network: nn.Module) -> int:
    """Let every symmetric contraction of `network` use the table form. Parameters and their names stay.

    Returns:
        The number of contractions found (0 for a network that has none).
    """
    found = symmetric_contractions(network)
    for _, module in found:
        table = TableContraction(module)
        # On this instance alone; `remove_table_contraction` uncovers the class's own forward again.
        module.forward = MethodType(lambda self, x, y, table=table: table(x, y), module)
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

    def __init__(self, stock: nn.Module) -> None:
        self.contractions: list[nn.Module] = list(stock.contractions)
        self.correlations: list[int] = [int(c.correlation) for c in self.contractions]
        self.n = int(self.contractions[0].U_tensors(1).shape[-2])  # components of the input per channel
        self.widths = [2 * ir.ir.l + 1 for ir in stock.irreps_out]
        self._kept: dict[int, Tensor] = {}
        self._kept_for: tuple[object, ...] = ()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """As mace's: x (n_atoms, channels, n), one-hot y (n_atoms, n_elements) -> (n_atoms, channels * sum(2l+1))."""
        a = x.transpose(0, 1)  # (c, atoms, n)
        monomials = self._monomials(a)
        element = y.argmax(dim=1)
        order = element.argsort(stable=True)
        counts = torch.bincount(element, minlength=y.shape[1]).tolist()
        present = [e for e, count in enumerate(counts) if count]
        tables = self._tables(present)
        parts, start = [], 0
        for e in present:
            rows = order[start : start + counts[e]]
            parts.append(torch.bmm(monomials[:, rows], tables[e]))
            start += counts[e]
        if not parts:  # no atoms
            return x.new_zeros(0, x.shape[1] * sum(self.widths))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        out = torch.cat(parts, dim=1)[:, back]  # (c, atoms, w * n)
        out = (out.unflatten(-1, (-1, self.n)) * a.unsqueeze(2)).sum(-1).transpose(0, 1)  # (atoms, c, w)
        return torch.cat([piece.flatten(1) for piece in out.split(self.widths, dim=-1)], dim=1)

    def _monomials(self, a: Tensor) -> Tensor:
        """All products of fewer than `correlation` components, highest degree first: (c, atoms, q)."""
        parts = [torch.ones_like(a[..., :1])]
        for _ in range(max(self.correlations) - 1):
            parts.insert(0, (parts[0].unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2))
        return torch.cat(parts, dim=-1)

    def _tables(self, elements: list[int]) -> dict[int, Tensor]:
        """Element -> T of shape (c, q, w * n)."""
        weights = [w for c in self.contractions for w in _weights(c)]
        couplings = [c.U_tensors(k) for c in self.contractions for k in (1, c.correlation)]
        if any(w.requires_grad for w in weights):
            self._kept, self._kept_for = {}, ()
            return {e: self._table(e) for e in elements}
        # The version counts in-place changes of a tensor, so neither a new tensor nor an edited one goes unseen.
        # The tensors themselves are held, so that an address is not used again.
        state = tuple((t, t._version) for t in (*weights, *couplings))
        if not _same(state, self._kept_for):
            self._kept, self._kept_for = {}, state
        for e in elements:
            if e not in self._kept:
                with torch.no_grad():
                    self._kept[e] = self._table(e)
        return self._kept

    def _table(self, element: int) -> Tensor:
        highest = max(self.correlations)
        columns = []
        for contraction, width in zip(self.contractions, self.widths, strict=True):
            weights = dict(zip(range(contraction.correlation, 0, -1), _weights(contraction), strict=True))
            degrees = []
            for k in range(highest, 0, -1):  # U_k has k input components: k - 1 in the monomial, the last one apart
                if k > contraction.correlation:
                    degrees.append(weights[1].new_zeros(weights[1].shape[-1], self.n ** (k - 1), width, self.n))
                    continue
                u = contraction.U_tensors(k)
                u = u.reshape(width, self.n ** (k - 1), self.n, u.shape[-1])
                degrees.append(torch.einsum("wqik,kc->cqwi", u, weights[k][element]))
            columns.append(torch.cat(degrees, dim=1))
        return torch.cat(columns, dim=2).flatten(2)  # (c, q, w * n)

    def __deepcopy__(self, memo: dict[int, object]) -> TableContraction:
        raise TypeError("copy the network with its contractions removed (`remove_table_contraction`) and add them again")


def _weights(contraction: nn.Module) -> list[Tensor]:
    """Of the highest correlation first."""
    return [contraction.weights_max, *contraction.weights]


def _same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return len(a) == len(b) and all(x[0] is y[0] and x[1] == y[1] for x, y in zip(a, b, strict=True))  # type: ignore[index]

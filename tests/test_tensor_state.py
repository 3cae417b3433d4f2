"""Whether tensors are still what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from mmea_calc.fast.tensor_state import Watched, same_state, state_of


class _Network(nn.Module):
    nothing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.linear(x)))


def _watched(network: nn.Module) -> Watched:
    return Watched(
        cast(dict[str, Tensor | None], store) for m in network.modules() for store in (m._parameters, m._buffers)
    )


@torch.no_grad()
def _edit_in_place(network: _Network) -> None:
    network.linear.weight[0, 0] = 7.0


def _edit_a_buffer(network: _Network) -> None:
    assert network.norm.running_mean is not None
    network.norm.running_mean.add_(1.0)


def _another_parameter(network: _Network) -> None:
    network.linear.weight = nn.Parameter(network.linear.weight.detach().clone())


def _another_storage(network: _Network) -> None:
    network.linear.weight.data = network.linear.weight.detach().clone()


def _another_precision(network: _Network) -> None:
    network.double()


def _one_more(network: _Network) -> None:
    network.register_buffer("more", torch.zeros(2))


def _one_less(network: _Network) -> None:
    network.norm.running_mean = None


def _something_where_nothing_was(network: _Network) -> None:
    network.nothing = torch.ones(1)


@pytest.mark.parametrize(
    "change",
    [
        _edit_in_place,
        _edit_a_buffer,
        _another_parameter,
        _another_storage,
        _another_precision,
        _one_more,
        _one_less,
        _something_where_nothing_was,
    ],
)
def test_every_change_is_seen_once(change: Callable[[_Network], None]) -> None:
    network = _Network()
    watched = _watched(network)
    assert watched.changed()  # there was no look before
    assert not watched.changed()
    network.eval()(torch.zeros(1, 3))
    assert not watched.changed()  # a call in inference is no change
    change(network)
    assert watched.changed()
    assert not watched.changed()


def test_states_hold_what_they_compare() -> None:
    tensor = torch.zeros(2)
    before = state_of([tensor], "a setting")
    assert same_state(before, state_of([tensor], "a setting"))
    assert not same_state(before, state_of([tensor], "another"))
    assert not same_state(before, state_of([tensor.clone()], "a setting"))
    tensor += 1
    assert not same_state(before, state_of([tensor], "a setting"))

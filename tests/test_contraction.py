"""The table form of the symmetric contraction is mace's own, to rounding, in values and all derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from architectures import ARCHITECTURES, borrowed
from torch import Tensor, nn

from conftest import ELEMENTS, batch_of, crystal, ethanol, random_network, randomise, run
from mmea_calc.adapted import Adapter, attach
from mmea_calc.config import AdapterConfig
from mmea_calc.fast.contraction import remove_table_contraction, use_table_contraction
from mmea_calc.graph import Batch, build_graph, collate
from mmea_calc.mace_bridge import symmetric_contractions


def structures(dtype: torch.dtype = torch.float64) -> Batch:
    return batch_of(ethanol(), crystal(), ethanol()[[2]], dtype=dtype)


def assert_agree(network: nn.Module, batch: Batch, tolerance: float) -> None:
    """Table form and stock form, whichever is installed at present."""
    use_table_contraction(network)
    table = run(network, batch, compute_stress=True)
    remove_table_contraction(network)
    stock = run(network, batch, compute_stress=True)
    use_table_contraction(network)
    for key in ("energy", "forces", "stress"):
        scale = max(1.0, float(stock[key].abs().max()))
        torch.testing.assert_close(table[key], stock[key], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_table_form_gives_the_stock_values(name: str) -> None:
    with borrowed(name) as network:
        assert use_table_contraction(network) == len(symmetric_contractions(network)) > 0
        assert_agree(network, structures(), 1e-12)
        assert_agree(network.float(), structures(torch.float32), 1e-5)


def gradients(network: nn.Module, adapter: Adapter) -> list[Tensor]:
    """Of a loss of forces and energies: second derivatives of the network."""
    tensors = dict(structures().tensors)
    output = network({**tensors, "positions": tensors["positions"].clone()}, training=True)
    loss = output["forces"].square().sum() + output["energy"].square().sum()
    found = torch.autograd.grad(loss, adapter.parameters())
    assert len(found) == len(adapter.parameters())
    return list(found)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_of_a_loss_of_forces_is_the_stock_one(name: str) -> None:
    with borrowed(name) as network:
        adapter = attach(network, AdapterConfig(gate_rank=2, low_rank=2))
        randomise(adapter)
        stock = gradients(network, adapter)
        use_table_contraction(network)
        table = gradients(network, adapter)
    scale = max(float(g.abs().max()) for g in stock)
    assert scale > 1e-3
    for one, other in zip(table, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * scale)


def test_many_elements_and_an_element_that_is_absent() -> None:
    elements = (1, 3, 6, 7, 8, 9, 16, 17, 35)
    network = random_network(
        atomic_numbers=list(elements), atomic_energies=[0.0] * len(elements), hidden_irreps="2x0e + 2x1o"
    )
    atoms = ethanol()
    atoms.numbers[:6] = [35, 17, 9, 3, 7, 16]
    assert_agree(network, collate([build_graph(atoms, 4.0)], elements, dtype=torch.float64), 1e-12)
    assert_agree(network, collate([build_graph(ethanol(), 4.0)], elements, dtype=torch.float64), 1e-12)


@pytest.fixture
def network() -> Iterator[nn.Module]:
    with borrowed("agnostic") as network:
        yield network


def test_removing_restores_the_stock_module(network: nn.Module) -> None:
    before = {name: set(module.__dict__) for name, module in network.named_modules()}
    state, stock = list(network.state_dict()), run(network, structures())
    use_table_contraction(network)
    use_table_contraction(network)  # a second time changes nothing
    assert list(network.state_dict()) == state
    remove_table_contraction(network)
    assert {name: set(module.__dict__) for name, module in network.named_modules()} == before
    assert torch.equal(run(network, structures())["forces"], stock["forces"])


def test_a_network_without_contractions_is_left_alone() -> None:
    assert use_table_contraction(nn.Linear(2, 2)) == 0


def in_place(network: nn.Module) -> None:
    with torch.no_grad():
        for _, module in symmetric_contractions(network):
            for parameter in module.parameters():
                parameter.mul_(1.7)


def replaced(network: nn.Module) -> None:
    for _, module in symmetric_contractions(network):
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(-0.6 * parameter.detach(), requires_grad=False))


def new_data(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data = 0.8 * parameter.data


def loaded(network: nn.Module) -> None:
    network.load_state_dict({k: v * 1.1 if "weights" in k else v for k, v in network.state_dict().items()})


@pytest.mark.parametrize("change", [in_place, replaced, new_data, loaded])
def test_no_table_outlives_its_weights(change: Callable[[nn.Module], None]) -> None:
    network = random_network()
    use_table_contraction(network)
    before = run(network, structures())["forces"]
    change(network)
    assert not torch.allclose(run(network, structures())["forces"], before)
    assert_agree(network, structures(), 1e-12)


def test_no_table_outlives_a_change_of_precision(network: nn.Module) -> None:
    use_table_contraction(network)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float64, 1e-12)):
        assert_agree(network.to(dtype), structures(dtype), tolerance)


def test_no_table_outlives_an_adapter(network: nn.Module) -> None:
    use_table_contraction(network)
    bare = run(network, structures())["forces"]
    adapter = attach(network, AdapterConfig(gate_rank=2, low_rank=2))
    seen = []
    for seed in (1, 2):
        randomise(adapter, seed=seed)
        seen.append(run(network, structures())["forces"])
        adapter.merge()
        torch.testing.assert_close(run(network, structures())["forces"], seen[-1], rtol=0, atol=1e-12)
        with adapter.disabled():
            assert torch.equal(run(network, structures())["forces"], bare)
        torch.testing.assert_close(run(network, structures())["forces"], seen[-1], rtol=0, atol=1e-12)
        adapter.unmerge()
        assert_agree(network, structures(), 1e-12)
    assert not torch.allclose(seen[0], seen[1])
    adapter.detach()
    assert torch.equal(run(network, structures())["forces"], bare)


# e3nn 0.4 compiles what is copied; torch finds fault with its annotations.
@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")
def test_a_copy_of_a_network_reads_its_own_weights(network: nn.Module) -> None:
    use_table_contraction(network)
    before = run(network, structures())["forces"]
    other = copy.deepcopy(network)
    torch.testing.assert_close(run(other, structures())["forces"], before, rtol=0, atol=1e-12)
    in_place(other)
    assert torch.equal(run(network, structures())["forces"], before)
    assert not torch.allclose(run(other, structures())["forces"], before)
    assert_agree(other, structures(), 1e-12)


def test_tables_made_in_inference_mode_do_not_reach_a_gradient(network: nn.Module) -> None:
    use_table_contraction(network)
    expected = run(network, structures())
    other = random_network()
    use_table_contraction(other)
    with torch.inference_mode():
        energy = run(other, structures(), compute_force=False)["energy"]
    torch.testing.assert_close(energy, expected["energy"])
    assert torch.equal(run(other, structures())["forces"], expected["forces"])


def test_no_atoms_give_no_rows(network: nn.Module) -> None:
    (_, module), *_ = symmetric_contractions(network)
    use_table_contraction(network)
    n = (2 + 1) ** 2  # components up to max_ell of 2
    stock_width = 4 * (1 + 3)
    out = module(torch.zeros(0, 4, n, dtype=torch.float64), torch.zeros(0, len(ELEMENTS), dtype=torch.float64))
    assert tuple(out.shape) == (0, stock_width)

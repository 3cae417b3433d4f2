"""The table of methods meets the published numbers of trained parameters (arXiv 2511.06696, table 6)."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from conftest import network_config
from mmea_calc._e3nn import o3
from mmea_calc.adapted import attach
from mmea_calc.config import AdapterConfig
from mmea_calc.errors import AdapterError
from mmea_calc.mace_bridge import build_network
from mmea_calc.methods import METHODS, find_sites, method_named


@pytest.fixture(scope="module")
def paper_network() -> nn.Module:
    """The shape of MACE-OFF23 medium, for H, C and O."""
    return build_network(
        network_config(
            hidden_irreps="128x0e + 128x1o", max_ell=3, MLP_irreps="16x0e", radial_MLP=[64, 64, 64], r_max=5.0
        )
    )


@pytest.mark.parametrize(
    ("method", "gate_rank", "total"),
    [
        ("full", 16, 751_896),
        ("elora", 16, 175_880),
        ("mmea", 16, 151_354),
        ("mmea", 32, 201_258),
        ("gates", 16, 51_842),
    ],
)
def test_published_number_of_parameters(paper_network: nn.Module, method: str, gate_rank: int, total: int) -> None:
    adapter = attach(paper_network, AdapterConfig(method=method, gate_rank=gate_rank))
    try:
        assert adapter.n_parameters == total
        assert sum(row.count for row in adapter.trainable()) == total
        assert sum(adapter.counts().values()) == total
        assert adapter.skipped == {}
    finally:
        adapter.detach()


def test_published_number_of_parameters_by_part(paper_network: nn.Module) -> None:
    adapter = attach(paper_network, AdapterConfig(method="mmea", gate_rank=16))
    try:
        counts = adapter.counts()
        assert counts["gates"] == 51_842
        assert counts["tensor_product"] + counts["radial_layer"] + counts["contraction_highest"] == 92_976
        assert counts["contraction_lower"] == 6_528
        assert counts["radial_basis"] == 8
    finally:
        adapter.detach()


# Linear layers of the paper's network: even scalars in, even scalars out, other multiplicities out.
# linear_up, linear, product.linear of both interactions, then the readouts (128 -> 1; 128 -> 16 -> 1).
LINEARS = [(128, 128, 0), (128, 128, 384), (128, 128, 128), (128, 128, 128), (256, 128, 384), (128, 128, 0),
           (128, 1, 0), (128, 16, 0), (16, 1, 0), (3, 128, 0)]  # fmt: skip


def gate_count(rank: int = 16, bottlenecks: int = 1, shift: bool = True, gains: str = "channel") -> int:
    """Of all gates, from the definitions."""
    total = 0
    for m0, k0, k1 in LINEARS:
        orders = {0: 0, 128: 1, 384: 3}[k1]  # 128x1o, or 128x1o + 128x2e + 128x3o
        heads = [k0 if shift else 0, {"channel": k1, "order": orders, "none": 0}[gains]]
        present = [k for k in heads if k]
        total += (m0 + 1) * rank * min(len(present), bottlenecks) + sum((rank + 1) * k for k in present)
    return total


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, gate_count()),
        (dict(gate_rank=32), gate_count(32)),
        (dict(nonlinearity=False), gate_count()),
        (dict(separate_bottlenecks=True), gate_count(bottlenecks=2)),
        (dict(shift=False), gate_count(shift=False)),
        (dict(gains="none"), gate_count(gains="none")),
        (dict(gains="order"), gate_count(gains="order")),
    ],
)
def test_ablations_have_the_parameters_of_their_definitions(
    paper_network: nn.Module, options: dict[str, Any], expected: int
) -> None:
    assert gate_count() == 51_842
    for method, rest in (("gates", 0), ("mmea", 92_976 + 6_528 + 8)):
        adapter = attach(paper_network, AdapterConfig(method=method, **options))
        try:
            assert adapter.n_parameters == sum(row.count for row in adapter.trainable()) == expected + rest
            assert adapter.counts()["gates"] == expected
        finally:
            adapter.detach()


def test_a_sparse_adapter_has_an_increment_for_every_path_weight_and_a_threshold_for_every_tensor(
    paper_network: nn.Module,
) -> None:
    adapter = attach(paper_network, AdapterConfig(method="sparse"))
    try:
        kinds = {site.kind for site in adapter.sites.values()}
        assert kinds == {"linear", "tensor_product", "radial_layer", "contraction_highest", "contraction_lower"}
        assert adapter.n_parameters == 751_896 - 8 + len(adapter.updates)
        assert sum(name.endswith(".tau") for name, _ in adapter.named_parameters()) == len(adapter.updates)
    finally:
        adapter.detach()


def test_scratch_trains_what_full_trains(paper_network: nn.Module) -> None:
    adapter = attach(paper_network, AdapterConfig(method="scratch"), start=False)
    assert adapter.n_parameters == 751_896
    adapter.detach()


def test_a_bottleneck_has_two_matrices_on_the_features_of_every_linear_layer(paper_network: nn.Module) -> None:
    adapter = attach(paper_network, AdapterConfig(method="bottleneck", gate_rank=8))
    try:
        widths = [m.irreps_out.dim for m in paper_network.modules() if isinstance(m, o3.Linear)]
        assert len(widths) == len(LINEARS)
        assert adapter.n_parameters == sum(2 * 8 * width for width in widths)
    finally:
        adapter.detach()


def test_paths_and_orders_of_the_weights_are_known(paper_network: nn.Module) -> None:
    blocks = {s.path: [(b.path, b.order) for b in s.blocks] for s in find_sites(paper_network)}
    assert blocks["interactions.1.linear_up.weight"] == [("0e -> 0e", 0), ("1o -> 1o", 1)]
    contraction = "products.0.symmetric_contractions.contractions"
    assert blocks[f"{contraction}.0.weights_max"] == [("nu=3 -> l=0", 0)]
    assert blocks[f"{contraction}.1.weights_max"] == [("nu=3 -> l=1", 1)]
    assert [blocks[f"{contraction}.1.weights.{i}"] for i in (0, 1)] == [[("nu=2 -> l=1", 1)], [("nu=1 -> l=1", 1)]]


def test_every_trained_tensor_of_the_backbone_is_a_site_once(paper_network: nn.Module) -> None:
    sites = find_sites(paper_network)
    assert sum(s.value.numel() for s in sites) == 751_896
    assert len({s.path for s in sites}) == len(sites)
    for site in sites:
        assert paper_network.get_submodule(site.name) is site.module


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(AdapterError, match=r"unknown method 'lora'; expected one of .*mmea.*gates"):
        method_named("lora")


def test_every_method_has_a_summary_for_users() -> None:
    assert all(method.summary for method in METHODS.values())
    assert {"mmea", "gates", "elora", "sparse", "full", "readout", "scratch", "bottleneck"} <= set(METHODS)

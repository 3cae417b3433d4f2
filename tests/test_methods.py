"""The table of methods meets the published numbers of trained parameters (arXiv 2511.06696, table 6)."""

from __future__ import annotations

import pytest
from torch import nn

from conftest import network_config
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
    assert {"mmea", "gates", "elora", "full", "readout"} <= set(METHODS)

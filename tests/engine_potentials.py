"""A small backbone with a random adapter, twice: for another engine, and as ASE's calculator beside it."""

from __future__ import annotations

from functools import cache

from conftest import ELEMENTS, network_config, random_network, randomise
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import AdapterFile
from mmea_calc.backbone import Backbone
from mmea_calc.calculator import MMEACalculator
from mmea_calc.config import AdapterConfig
from mmea_calc.fast_path import use_fast_path
from mmea_calc.potential import Potential

E0 = {1: -13.6, 6: -1027.3, 8: -2038.5}


def small_backbone() -> Backbone:
    """A random network with reference energies, float64."""
    network = random_network()
    use_fast_path(network)
    return Backbone(
        name="small",
        source="built by the tests",
        network=network,
        config=network_config(),
        fingerprint="f" * 64,
        elements=ELEMENTS,
        r_max=4.0,
        heads=("Default",),
        head="Default",
        atomic_energies=dict(E0),
    )


@cache
def adapter_file() -> AdapterFile:
    backbone = small_backbone()
    adapter = attach(backbone.network, AdapterConfig(gate_rank=3, low_rank=2))
    randomise(adapter)
    tensors = adapter.state_dict()
    adapter.detach()
    return AdapterFile(
        adapter.config,
        tensors,
        backbone.name,
        backbone.fingerprint,
        head=backbone.head,
        reference_energies={6: -1000.0},
        elements=ELEMENTS,
    )


@cache
def potential() -> Potential:
    """For the engine under test; tests leave it as it is."""
    result = Potential(small_backbone())
    result.use(adapter_file())
    return result


@cache
def reference() -> MMEACalculator:
    """What its results are compared with, on a backbone of its own."""
    return MMEACalculator(adapter_file(), small_backbone())

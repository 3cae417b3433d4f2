"""A small backbone with a random adapter, twice: for another engine, and as ASE's calculator beside it."""

from __future__ import annotations

from functools import cache

from conftest import ELEMENTS, random_network, randomise, small_backbone_around
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import AdapterFile
from mmea_calc.backbone import Backbone
from mmea_calc.calculator import MMEACalculator
from mmea_calc.config import AdapterConfig
from mmea_calc.potential import Potential

E0 = {1: -13.6, 6: -1027.3, 8: -2038.5}


def small_backbone() -> Backbone:
    """A random network with reference energies, float64."""
    return small_backbone_around(random_network(), E0)


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

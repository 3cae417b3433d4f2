"""mace-torch is imported without side effects, and a network and its config are two forms of one thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import batch_of, ethanol, network_config, random_network, run
from mmea_calc.errors import BackboneError
from mmea_calc.mace_bridge import (
    build_network,
    config_of,
    is_bessel,
    is_contraction,
    is_untrained,
    symmetric_contractions,
)
from mmea_calc.mace_networks import accept_neutral_graphs, mark_untrained

ROOT = Path(__file__).resolve().parents[1]

_PROBE = """
import os, sys
sys.path.insert(0, {root!r})
environment = dict(os.environ)
import torch
defaults = torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state()
from mmea_calc import mace_bridge
assert mace_bridge.mace_modules().__name__ == "mace.modules"
assert mace_bridge.mace_calculators().__name__ == "mace.calculators"
assert dict(os.environ) == environment, "environment"
assert torch.get_default_dtype() == defaults[0] and torch.get_num_threads() == defaults[1], "defaults"
assert torch.equal(torch.random.get_rng_state(), defaults[2]), "random state"
class Trap:
    def __reduce__(self):
        return (sys.exit, ("unsafe loading",))
torch.save(Trap(), {file!r})
try:
    torch.load({file!r})
except Exception as refusal:
    assert "eights only" in str(refusal), refusal
else:
    sys.exit("loaded a pickle by default")
"""


def test_importing_mace_prints_nothing_and_leaves_environment_and_safe_loading(tmp_path: Path) -> None:
    program = _PROBE.format(root=str(ROOT), file=str(tmp_path / "trap.pt"))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False, timeout=300
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_building_leaves_default_dtype_and_random_state() -> None:
    state, environment = torch.random.get_rng_state(), dict(os.environ)
    network = build_network(network_config())
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.random.get_rng_state(), state)
    assert dict(os.environ) == environment
    assert {p.dtype for p in network.parameters()} == {torch.float64}


def test_e3nn_keeps_its_own_settings_after_building() -> None:
    import e3nn

    before = dict(e3nn.get_optimization_defaults())
    build_network(network_config())
    assert e3nn.get_optimization_defaults() == before


def test_random_weights_follow_the_seed() -> None:
    one, same, other = random_network(1), random_network(1), random_network(2)
    values = [torch.cat([p.flatten() for p in n.parameters()]) for n in (one, same, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


DENSITY = {
    "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
    "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no scale and shift": {"model": "MACE"},
    "residual first": {"interaction_cls_first": "RealAgnosticResidualInteractionBlock"},
    "density": DENSITY,
    "attention": {"interaction_cls": "RealAgnosticAttResidualInteractionBlock"},
    "nonlinear": {
        "interaction_cls_first": "RealAgnosticResidualNonLinearInteractionBlock",
        "interaction_cls": "RealAgnosticResidualNonLinearInteractionBlock",
        "edge_irreps": "4x0e + 4x1o",
        "apply_cutoff": False,
        "use_agnostic_product": True,
    },
    "agnesi and repulsion": {"distance_transform": "Agnesi", "pair_repulsion": True},
    "soft transform": {"distance_transform": "Soft"},
    "gaussian radial functions": {"radial_type": "gaussian"},
    "chebyshev radial functions": {"radial_type": "chebyshev"},
    "correlation 1": {"correlation": 1},
    "correlation 2": {"correlation": 2},
    "correlation per layer": {"correlation": [3, 2]},
    "L = 0": {"hidden_irreps": "4x0e"},
    "L = 2": {"hidden_irreps": "4x0e + 4x1o + 4x2e", "max_ell": 3},
    "one interaction": {"num_interactions": 1},
    "three interactions": {"num_interactions": 3},
    "tanh gate": {"gate": "tanh"},
    "bias readout": {"readout_cls": "NonLinearBiasReadoutBlock"},
    "last readout only": {"use_last_readout_only": True},
    "last layer keeps irreps": {"keep_last_layer_irreps": True},
    "two heads": {
        "heads": ["pbe", "r2scan"],
        "atomic_energies": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
        "atomic_inter_scale": [1.0, 2.0],
        "atomic_inter_shift": [0.1, 0.2],
    },
    "charge and spin": {
        "embedding_specs": {
            "total_charge": {"type": "categorical", "per": "graph", "num_classes": 5, "emb_dim": 4, "offset": 2},
            "total_spin": {"type": "categorical", "per": "graph", "num_classes": 5, "emb_dim": 4},
        }
    },
}


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Irreps written one way, and without what a network of one interaction does not have."""
    config = {key: value for key, value in config.items() if value is not None}
    for key in ("hidden_irreps", "edge_irreps"):
        if key in config:
            config[key] = config[key].replace(" ", "")
    if config["num_interactions"] == 1:  # the only layer is the first one, its readout linear, its irreps scalars
        for key in ("interaction_cls", "MLP_irreps", "hidden_irreps"):
            config.pop(key)
    return config


@pytest.mark.parametrize("shape", SHAPES)
def test_config_read_off_a_network_rebuilds_it_with_identical_outputs(shape: str) -> None:
    network = random_network(3, **SHAPES[shape])
    config = json.loads(json.dumps(config_of(network)))
    given, read = comparable(network_config(**SHAPES[shape])), comparable(config)
    if SHAPES[shape].get("model") == "MACE":  # has neither
        del given["atomic_inter_scale"], given["atomic_inter_shift"]
    assert {key: read.get(key) for key in given} == given

    again = build_network(config)
    again.load_state_dict(network.state_dict(), strict=True)
    for copy in (network, again):
        accept_neutral_graphs(copy)
    for head in range(len(config["heads"])):
        batch = batch_of(ethanol(), head=head)
        one, other = run(network, batch), run(again, batch)
        assert torch.equal(one["energy"], other["energy"])
        assert torch.equal(one["forces"], other["forces"])
    assert one["forces"].abs().max() > 1e-6


def test_heads_differ_so_that_agreeing_on_them_means_something() -> None:
    network = random_network(3, **SHAPES["two heads"])
    energies = [run(network, batch_of(ethanol(), head=head))["energy"] for head in (0, 1)]
    assert abs(float(energies[0] - energies[1])) > 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interaction_cls": "Imagined"}, "RealAgnosticResidualInteractionBlock"),
        ({"hidden_irreps": "sixteen scalars"}, "sixteen scalars"),
        ({"gate": "softplus"}, "silu"),
        ({"model": "PolarMACE"}, "PolarMACE"),
        ({"atomic_energies": [0.0]}, "3 elements"),
        ({"correlation": [3]}, "cannot build"),
    ],
)
def test_config_that_cannot_be_built_is_one_clear_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BackboneError, match=words):
        build_network(network_config(**changes))


def test_config_without_a_value_names_it() -> None:
    config = network_config()
    del config["r_max"], config["atomic_inter_scale"]
    with pytest.raises(BackboneError, match="r_max, atomic_inter_scale"):
        build_network(config)


def test_config_of_anything_else_says_what_came() -> None:
    with pytest.raises(BackboneError, match="Linear"):
        config_of(torch.nn.Linear(2, 2))


def test_contractions_and_radial_basis_are_recognised() -> None:
    network = random_network(0)
    names = [name for name, _ in symmetric_contractions(network)]
    assert names == ["products.0.symmetric_contractions", "products.1.symmetric_contractions"]
    # 0e and 1o out of the first layer, 0e out of the last
    assert sum(is_contraction(m) for m in network.modules()) == 3
    assert sum(is_bessel(m) for m in network.modules()) == 1
    assert not is_contraction(torch.nn.Linear(2, 2))
    assert symmetric_contractions(torch.nn.Linear(2, 2)) == []


def test_weights_of_vanishing_couplings_are_marked_again_after_they_were_forgotten() -> None:
    # One vector alone has no part of order 2: those weights of the contraction stay at zero for ever.
    network = random_network(0, max_ell=1, hidden_irreps="4x0e + 4x2e", num_interactions=2)
    marked = [name for name, p in network.named_parameters() if is_untrained(p)]
    assert marked
    for module in network.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and is_untrained(parameter):
                module._parameters[key] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
    assert not any(is_untrained(p) for p in network.parameters())
    mark_untrained(network)
    assert [name for name, p in network.named_parameters() if is_untrained(p)] == marked


def test_graphs_without_charge_and_spin_are_neutral_singlets() -> None:
    network = random_network(3, **SHAPES["charge and spin"])
    batch = batch_of(ethanol())
    one = torch.ones(1, dtype=torch.float64)
    explicit = dict(batch.tensors, total_charge=0 * one, total_spin=one)
    charged = dict(batch.tensors, total_charge=one, total_spin=one)
    energies = [network(dict(data), compute_force=False)["energy"] for data in (explicit, charged)]
    accept_neutral_graphs(network)
    implied = network(dict(batch.tensors), compute_force=False)["energy"]
    assert torch.equal(implied, energies[0])
    assert not torch.equal(implied, energies[1])


def test_embedding_of_an_unknown_quantity_is_refused() -> None:
    spec = {"type": "continuous", "per": "graph", "in_dim": 1, "emb_dim": 4}
    network = random_network(3, embedding_specs={"temperature": spec})
    with pytest.raises(BackboneError, match="temperature"):
        accept_neutral_graphs(network)

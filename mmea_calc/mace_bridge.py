"""The file that knows the modules of mace-torch 0.3; `mace_networks.py` and `mace_names.py` belong to it.

It imports them without their side effects, builds a network from a readable config, reads that config off a live
network, and tells what a module is. A second family of backbones is a second file like this one.

mace-torch 0.3.16, when imported, prints, and switches torch's safe loading off for the whole process by an environment
variable, for the sake of a `slice` in e3nn's constants. Import it through `mace_modules()`, which leaves none of this.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .errors import BackboneError

_LOCK = threading.RLock()

# config key -> value that networks written before the key existed were built with
_OPTIONAL: dict[str, Any] = {
    "pair_repulsion": False,
    "apply_cutoff": True,
    "use_reduced_cg": False,
    "use_so3": False,
    "use_agnostic_product": False,
    "use_last_readout_only": False,
    "use_embedding_readout": False,
    "distance_transform": "None",
    "edge_irreps": None,
    "use_edge_irreps_first": False,
    "radial_MLP": [64, 64, 64],
    "radial_type": "bessel",
    "heads": None,
    "embedding_specs": None,
    "readout_cls": "NonLinearReadoutBlock",
    "keep_last_layer_irreps": False,
}
_REQUIRED = (
    "r_max",
    "num_bessel",
    "num_polynomial_cutoff",
    "max_ell",
    "interaction_cls",
    "interaction_cls_first",
    "num_interactions",
    "hidden_irreps",
    "MLP_irreps",
    "atomic_energies",
    "avg_num_neighbors",
    "atomic_numbers",
    "correlation",
    "gate",
)
_RADIAL_TYPES = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
_TRANSFORMS = {"AgnesiTransform": "Agnesi", "SoftTransform": "Soft"}


# --- importing ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a piece of another package's code from printing, warning, or changing the process's environment."""
    with _LOCK:
        before = dict(os.environ)
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            for name in set(os.environ) - set(before):
                del os.environ[name]
            for name, value in before.items():
                if os.environ.get(name) != value:
                    os.environ[name] = value


def _import(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    # e3nn's table of Wigner symbols is a pickle with `slice` in it: allow exactly that, and only while it is read.
    with quiet(), torch.serialization.safe_globals([slice]):
        return importlib.import_module(name)


def mace_modules() -> ModuleType:
    """`mace.modules`, imported without side effects."""
    return _import("mace.modules")


def mace_calculators() -> ModuleType:
    """`mace.calculators`, imported without side effects."""
    mace_modules()
    return _import("mace.calculators")


@contextlib.contextmanager
def _building() -> Iterator[None]:
    """Constants in float64, plain (not TorchScript) e3nn code, and the caller's random state untouched.

    TorchScript's profiler changes the last bits between the first and the second call, so that a resumed training
    could not repeat itself; plain code is within some per cent of it in speed and builds three times faster.
    """
    mace_modules()
    import e3nn

    with quiet(), torch.random.fork_rng(devices=[]):
        dtype, optimisation = torch.get_default_dtype(), dict(e3nn.get_optimization_defaults())
        try:
            torch.set_default_dtype(torch.float64)
            e3nn.set_optimization_defaults(jit_script_fx=False)
            yield
        finally:
            torch.set_default_dtype(dtype)
            e3nn.set_optimization_defaults(**optimisation)


# --- config -> network ----------------------------------------------------------------------------------------------


def build_network(config: dict[str, Any]) -> nn.Module:
    """A network with random weights drawn from torch's generator, whose state is left as it was.

    Args:
        config: plain values under the names of mace-torch's arguments. Classes, irreps and the activation by name;
            `atomic_energies` one value per element, or one such list per head; `atomic_inter_scale` and
            `atomic_inter_shift` (of a ScaleShiftMACE) one value, or one per head; `model` is "ScaleShiftMACE" (the
            default) or "MACE". Names that are not arguments ("level_of_theory", "training", ...) are left aside.

    Returns:
        the network in float64, on the CPU.

    Raises:
        BackboneError: a value is missing, or not one that mace-torch knows.
    """
    arguments = _arguments(config)
    try:
        with _building():
            return getattr(mace_modules(), config.get("model", "ScaleShiftMACE"))(**arguments)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        raise BackboneError(
            f"mace-torch cannot build a network from this config ({type(problem).__name__}: {problem}); "
            "check irreps, correlation and interaction classes"
        ) from problem


def of_cuequivariance(network: nn.Module) -> nn.Module:
    """A network like this one, with its weights, of cuEquivariance's layers, whose features lie (2l+1, multiplicity).

    Raises:
        BackboneError: mace-torch cannot make one.
    """
    try:
        with _building():
            convert = importlib.import_module("mace.cli.convert_e3nn_cueq")
            device = next(network.parameters()).device
            # It asks whether the device is called "cuda", without a number, before it takes the fused convolution.
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                return convert.run(network, device=device.type, return_model=True)
    except Exception as problem:  # whatever another package's code makes of a network that it does not know
        raise BackboneError(
            f"mace-torch cannot convert this network to cuEquivariance ({type(problem).__name__}: {problem})"
        ) from problem


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of mace-torch's constructor. Raises BackboneError."""
    modules = mace_modules()
    import numpy as np
    from e3nn import o3

    model = config.get("model", "ScaleShiftMACE")
    if model not in ("MACE", "ScaleShiftMACE"):
        raise BackboneError(f"networks of class {model} are not supported; expected MACE or ScaleShiftMACE")
    needed = _REQUIRED + (("atomic_inter_scale", "atomic_inter_shift") if model == "ScaleShiftMACE" else ())
    if missing := [key for key in needed if key not in config]:
        raise BackboneError(f"the config of a {model} lacks {', '.join(missing)}")
    arguments = {key: config[key] for key in needed} | {key: config.get(key, v) for key, v in _OPTIONAL.items()}

    def choose(key: str, table: dict[str, Any]) -> None:
        if str(arguments[key]) not in table:
            raise BackboneError(f"{key} is {arguments[key]!r}; mace-torch knows {', '.join(map(str, table))}")
        arguments[key] = table[str(arguments[key])]

    choose("interaction_cls", modules.interaction_classes)
    choose("interaction_cls_first", modules.interaction_classes)
    choose("readout_cls", modules.readout_classes)
    choose("gate", modules.gate_dict)
    for key in ("hidden_irreps", "MLP_irreps", "edge_irreps"):
        try:
            arguments[key] = None if arguments[key] is None else o3.Irreps(arguments[key])
        except Exception as problem:  # e3nn's parser raises whatever the text provokes
            raise BackboneError(f"{key} is {arguments[key]!r}, which e3nn does not read as irreps") from problem
    arguments["num_elements"] = len(arguments["atomic_numbers"])
    arguments["atomic_energies"] = np.asarray(arguments["atomic_energies"], dtype=np.float64)
    if arguments["atomic_energies"].shape[-1] != arguments["num_elements"]:
        raise BackboneError(
            f"atomic_energies has {arguments['atomic_energies'].shape[-1]} values per head; "
            f"expected one for each of the {arguments['num_elements']} elements"
        )
    return arguments


def fresh_tensors(network: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """The state dict of a freshly initialised network of `network`'s shape, in float64.

    Raises:
        BackboneError: `network` is none that `build_network` can build.
    """
    config = config_of(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(config).state_dict()


# --- network -> config ----------------------------------------------------------------------------------------------


def config_of(network: nn.Module) -> dict[str, Any]:
    """The inverse of `build_network`: plain values that JSON can hold, without the weights.

    The E0 buffer is taken as it is; a network whose buffer was zeroed gives zeros.

    Raises:
        BackboneError: the network is not a MACE or ScaleShiftMACE in e3nn's own layout; the message says what is
            not supported.
    """
    modules = mace_modules()
    model = type(network).__name__
    if type(network) not in (modules.MACE, modules.ScaleShiftMACE):
        raise BackboneError(f"networks of class {model} are not supported; expected MACE or ScaleShiftMACE")
    for name, module in network.named_modules():
        for backend in ("cueq_config", "oeq_config"):
            if getattr(getattr(module, backend, None), "enabled", False):
                raise BackboneError(
                    f"{name or 'the network'} was converted for {backend.split('_')[0]}; "
                    "convert it back to e3nn with mace-torch's own tool first"
                )
    try:
        return {"model": model} | _shape_config(network) | _readout_config(network) | _value_config(network)
    except (AttributeError, IndexError, TypeError, ValueError) as problem:
        raise BackboneError(
            f"this {model} lacks a part that mace-torch 0.3.16 networks have ({problem}); "
            "it can be used as it is but not converted"
        ) from problem


def _shape_config(network: Any) -> dict[str, Any]:
    """Radial functions, irreps and interactions."""
    radial, interactions, products = network.radial_embedding, network.interactions, network.products
    basis, transform = type(radial.bessel_fn).__name__, getattr(radial, "distance_transform", None)
    if basis not in _RADIAL_TYPES:
        raise BackboneError(f"radial functions of class {basis} are not supported; expected {', '.join(_RADIAL_TYPES)}")
    if transform is not None and type(transform).__name__ not in _TRANSFORMS:
        raise BackboneError(f"distance transform {type(transform).__name__} is not supported")
    first, last = type(interactions[0]).__name__, type(interactions[-1]).__name__
    hidden, final = str(products[0].linear.irreps_out), str(products[-1].linear.irreps_out)
    correlation = [_correlation(product.symmetric_contractions) for product in products]
    edge_irreps = getattr(network, "edge_irreps", None)
    widths = next(v for v in (getattr(radial.bessel_fn, k, None) for k in ("bessel_weights", "gaussian_weights", "n"))
                  if v is not None)  # fmt: skip
    return {
        "r_max": float(network.r_max),
        "num_bessel": int(widths.numel()),
        "num_polynomial_cutoff": int(radial.cutoff_fn.p),
        "radial_type": _RADIAL_TYPES[basis],
        "distance_transform": "None" if transform is None else _TRANSFORMS[type(transform).__name__],
        "apply_cutoff": bool(getattr(radial, "apply_cutoff", True)),
        "pair_repulsion": hasattr(network, "pair_repulsion_fn"),
        "max_ell": int(network.spherical_harmonics.irreps_out.lmax),
        "use_so3": bool(getattr(network, "use_so3", False)),
        "num_interactions": len(interactions),
        "interaction_cls_first": first,
        "interaction_cls": last,
        "radial_MLP": _radial_widths(interactions[0].conv_tp_weights),
        "avg_num_neighbors": float(interactions[0].avg_num_neighbors),
        "hidden_irreps": hidden,
        "edge_irreps": None if edge_irreps is None else str(edge_irreps),
        "use_edge_irreps_first": bool(getattr(network, "use_edge_irreps_first", False)),
        "keep_last_layer_irreps": len(products) > 1 and final == hidden and len(products[0].linear.irreps_out) > 1,
        "correlation": correlation[0] if len(set(correlation)) == 1 else correlation,
        "use_reduced_cg": bool(getattr(network, "use_reduced_cg", False)),
        "use_agnostic_product": bool(getattr(network, "use_agnostic_product", False)),
    }


def _correlation(contraction: Any) -> int:
    """Body order of a symmetric contraction: the largest nu of its coupling tensors."""
    if not _is_instance(contraction, "mace.modules.symmetric_contraction", "SymmetricContraction"):
        raise BackboneError(f"a symmetric contraction of class {type(contraction).__name__} is not supported")
    return max(int(name.rsplit("_", 1)[1]) for name, _ in contraction.named_buffers() if "U_matrix_" in name)


def _radial_widths(mlp: Any) -> list[int]:
    if hasattr(mlp, "hs"):
        return [int(h) for h in mlp.hs[1:-1]]
    return [int(m.out_features) for m in mlp.net if isinstance(m, nn.Linear)][:-1]  # networks before `hs` was kept


def _readout_config(network: Any) -> dict[str, Any]:
    """Heads, readouts, and embeddings of charge and spin."""
    last, heads = network.readouts[-1], list(getattr(network, "heads", None) or ["Default"])
    mlp, gate = "16x0e", "silu"
    if hasattr(last, "hidden_irreps"):
        scalars = last.hidden_irreps.count("0e")
        if len(last.hidden_irreps.simplify()) != 1 or scalars == 0:
            raise BackboneError(f"a readout with hidden irreps {last.hidden_irreps} is not supported; expected scalars")
        mlp = f"{scalars // len(heads)}x0e"
        activations = last.non_linearity.acts
        gate = "None" if len(activations) == 0 or activations[0] is None else activations[0].f.__name__
    return {
        "MLP_irreps": mlp,
        "gate": gate,
        "readout_cls": type(last).__name__ if len(network.interactions) > 1 else "NonLinearReadoutBlock",
        "heads": heads,
        "use_last_readout_only": bool(getattr(network, "use_last_readout_only", False)),
        "use_embedding_readout": hasattr(network, "embedding_readout"),
        "embedding_specs": getattr(network, "embedding_specs", None),
    }


def _value_config(network: Any) -> dict[str, Any]:
    """Elements, E0, and the scale and shift of the interaction energy."""
    values = {
        "atomic_numbers": network.atomic_numbers.tolist(),
        "atomic_energies": network.atomic_energies_fn.atomic_energies.double().tolist(),
    }
    if hasattr(network, "scale_shift"):
        values["atomic_inter_scale"] = network.scale_shift.scale.double().tolist()
        values["atomic_inter_shift"] = network.scale_shift.shift.double().tolist()
    return values


# --- what a module is -----------------------------------------------------------------------------------------------


def is_contraction(module: object) -> bool:
    """Whether this is one irrep's part of a symmetric contraction: coupling tensors U and weights per element."""
    return _is_instance(module, "mace.modules.symmetric_contraction", "Contraction")


def contraction_order(contraction: Any) -> int:
    """The order l of the output of one irrep's part of a symmetric contraction."""
    u = contraction.U_tensors(1)  # (2l+1, n, k); the first axis is absent for l = 0
    return (int(u.shape[0]) - 1) // 2 if u.dim() == 3 else 0


def is_bessel(module: object) -> bool:
    """Whether this is mace's Bessel basis (arXiv 2206.07697, eq. 7)."""
    return _is_instance(module, "mace.modules.radial", "BesselBasis")


def is_radial_embedding(module: object) -> bool:
    """Whether this turns lengths of edges into features: (lengths, node_attrs, edge_index, atomic_numbers)."""
    return _is_instance(module, "mace.modules.blocks", "RadialEmbeddingBlock")


def symmetric_contractions(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every symmetric contraction (arXiv 2206.07697, eqs. 10 and 11) of a network.

    Its `contractions` are the parts that `is_contraction` tells, one for each irrep of the output.
    """
    where, name = "mace.modules.symmetric_contraction", "SymmetricContraction"
    return [(path, module) for path, module in network.named_modules() if _is_instance(module, where, name)]


def interaction_blocks(network: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of every interaction block: `conv_tp` makes messages from features, harmonics and weights."""
    where, name = "mace.modules.blocks", "InteractionBlock"
    return [(path, module) for path, module in network.named_modules() if _is_instance(module, where, name)]


def reshapes(network: nn.Module) -> list[Any]:
    """Modules that stand the irreps of features, all with the same channels, beside each other for a contraction."""
    found = [m for m in network.modules() if _is_instance(m, "mace.modules.irreps_tools", "reshape_irreps")]
    return [m for m in found if getattr(m, "cueq_config", None) is None]


def radial_networks(network: nn.Module) -> list[tuple[Any, int]]:
    """Radial MLP of every interaction block, and the width of the network's radial embedding.

    The embedding is the same for both edges of a pair, also where it knows the sum of the elements' radii. What is
    wider has features of sender and receiver beside it.
    """
    width = int(getattr(getattr(network, "radial_embedding", None), "out_dim", 0))
    return [(block.conv_tp_weights, width) for _, block in interaction_blocks(network)]


def of_distance_alone(network: nn.Module) -> Any:
    """The radial embedding of a MACE network, if its features depend on nothing but the distance of two atoms."""
    embedding, blocks = getattr(network, "radial_embedding", None), sys.modules.get("mace.modules.blocks")
    known = blocks is not None and type(embedding) is blocks.RadialEmbeddingBlock
    return embedding if known and not hasattr(embedding, "distance_transform") else None


def headed_readouts(network: nn.Module) -> list[Any]:
    """Readouts that keep the hidden channels of one head of several: `non_linearity` of `linear_1` and a mask, in one
    of the two kinds the same with `linear_mid`, then `linear_2`.
    """
    blocks, names = sys.modules.get("mace.modules.blocks"), ("NonLinearReadoutBlock", "NonLinearBiasReadoutBlock")
    kinds = tuple(kind for name in names if (kind := getattr(blocks, name, None)) is not None)
    return [m for m in network.modules() if isinstance(m, kinds) and getattr(m, "num_heads", 1) > 1]


def element_layers(network: nn.Module) -> list[str]:
    """Paths of the linear layers of a MACE network that see nothing but an atom's element, in the order of their calls.

    The first takes the one-hot `node_attrs`, a later one what the one before gives. Where charge or spin are embedded,
    they are added in between. Empty for any other network.
    """
    if not _is_instance(network, "mace.modules.models", "MACE"):
        return []
    embedding = ["node_embedding.linear"]
    return embedding if hasattr(network, "joint_embedding") else [*embedding, "interactions.0.linear_up"]


def convolution_paths(network: nn.Module) -> dict[str, list[tuple[str, int, int]]]:
    """Which columns of the radial MLPs' last layers weight which paths of the convolutions.

    Returns:
        Path of the last layer's weight, (hidden, columns) -> for each run of columns: irreps of features, harmonics and
        messages, such as "1o x 2e -> 1o", the order l of the messages, the number of columns.
    """
    found = {}
    for name, block in interaction_blocks(network):
        product, layers = block.conv_tp, [n for n, _ in block.conv_tp_weights.named_children()]
        weight = getattr(getattr(block.conv_tp_weights, layers[-1]), "weight", None) if layers else None
        if weight is None or not hasattr(product, "instructions") or weight.shape[-1] != product.weight_numel:
            continue
        runs = []
        for ins in (i for i in product.instructions if i.has_weight):
            one, two = product.irreps_in1[ins.i_in1].ir, product.irreps_in2[ins.i_in2].ir
            out = product.irreps_out[ins.i_out].ir
            runs.append((f"{one} x {two} -> {out}", int(out.l), prod(ins.path_shape)))
        found[f"{name}.conv_tp_weights.{layers[-1]}.weight"] = runs
    return found


def is_untrained(parameter: object) -> bool:
    """Whether mace keeps this parameter at zero for ever: its coupling tensor vanishes by symmetry."""
    return _is_instance(parameter, "mace.modules.symmetric_contraction", "EmptyParam")


def _is_instance(module: object, where: str, class_name: str) -> bool:
    """Without importing mace: where it is not imported, nothing can be of its classes."""
    found = sys.modules.get(where)
    return found is not None and isinstance(module, getattr(found, class_name))

"""Named alternatives to the default recipe (the defaults of `TrainConfig` and `AdapterConfig`).

A method that has a recipe of its own name uses it where no recipe is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SPARSE: Mapping[str, Any] = {
    "optimizer": "schedulefree",
    "schedule": "constant",
    "ema_decay": 0.0,
    # Published: 64. Thresholds grow with the number of steps, and 1,000 of 64 are too many passes over few structures.
    "batch_size": 10,
    "steps": 1000,
    "lr": 0.01,
    "weight_decay": 1e-8,
    "tau_weight_decay": 0.01,
}

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    # arXiv 2511.06696, section 4 and its authors' code: E0s fitted to the training energies are an option of their
    # own (`--E0s`), since they are wrong for anything but a test on one molecule.
    "paper": {
        "epochs": 500,
        "batch_size": 5,
        "optimizer": "adamw",
        "lr": 0.005,
        "schedule": "plateau",
        "plateau_factor": 0.8,
        "plateau_patience": 5,
        "energy_weight": 1.0,
        "forces_weight": 1000.0,
        "loss": "mse",
        "stage_two_start": 0.8,
        "stage_two_lr": 0.001,
        "stage_two_energy_weight": 1000.0,
        "stage_two_forces_weight": 100.0,
        "ema_decay": 0.995,
        "clip_norm": 100.0,
        "weight_decay": 0.0,
        "amsgrad": True,
        "dtype": "float64",
        "validate_every": 1,
    },
    # Measured when SOAP saw no matrices in the one row that e3nn keeps a linear layer's weights in: AdamW was ahead on
    # rMD17 aspirin. Full fine-tuning bears a smaller rate than adapters (arXiv 2606.12704); 0.003 is ahead of 0.001
    # there.
    "full": {"optimizer": "adamw", "batch_size": 2, "lr": 0.003, "steps": 2000},
    # arXiv 2606.18691: low (L, the default of the method) and high (H) sparsity.
    "sparse": _SPARSE,
    "sparse-L": _SPARSE,
    "sparse-H": {**_SPARSE, "tau_weight_decay": 0.3},
}


def recipe_for(method: str, name: str | None = None) -> Mapping[str, Any]:
    """Settings of the recipe `name`; of the method's own one, or none, where no name is given.

    Raises:
        KeyError: no recipe is called `name`.
    """
    return RECIPES[name] if name is not None else RECIPES.get(method, {})

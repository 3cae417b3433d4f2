"""Several predictions of one structure -> their means and spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Names and meaning as in mace-torch's MACECalculator.
COMMITTEE_PROPERTIES = ("energy_comm", "energy_var", "forces_comm", "forces_var", "stress_comm", "stress_var")


def combine(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over members, every member's own value (`_comm`), and the variance over members (`_var`).

    Args:
        members: results under ASE's names, `energy` (eV) and arrays; all members have the same ones.

    Returns:
        results under the same names, and with the two endings for energy, forces and stress. The variance is the
        mean squared deviation from the mean: divided by the number of members.
    """
    results: dict[str, Any] = {}
    for key in ("energy", "energies", "forces", "stress"):
        if key not in members[0]:
            continue
        values = np.stack([m[key] for m in members])
        mean, variance = values.mean(axis=0), values.var(axis=0)
        results[key] = float(mean) if key == "energy" else mean
        if key != "energies":
            results[f"{key}_comm"] = values
            results[f"{key}_var"] = float(variance) if key == "energy" else variance
    results["free_energy"] = results["energy"]
    return results

"""Molecules written as SMILES, and geometries of them by RDKit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from ..errors import MMEAError


class RDKit(NamedTuple):
    """The parts of it that are used here."""

    chem: Any
    geometry: Any
    fields: Any
    smooth: Any


def rdkit() -> RDKit:
    """Raises MMEAError where it is not installed."""
    try:
        from rdkit import Chem
        from rdkit.Chem import rdDistGeom, rdForceFieldHelpers
        from rdkit.DistanceGeometry import DoTriangleSmoothing
    except ImportError as problem:
        raise MMEAError("conformers need RDKit, which is not installed: pip install 'mmea[label]'") from problem
    return RDKit(Chem, rdDistGeom, rdForceFieldHelpers, DoTriangleSmoothing)


def read_smiles(smiles: str) -> Any:
    """RDKit's molecule, its hydrogens implicit. Raises MMEAError: this is no molecule, or RDKit is not installed."""
    molecule = rdkit().chem.MolFromSmiles(smiles)
    if molecule is None:
        raise MMEAError(f"{smiles!r} is no molecule")
    return molecule


def numbers_of(molecule: Any) -> np.ndarray:
    """Atomic numbers, (n_atoms,)."""
    return np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()])


def relax(molecule: Any, conformer: int) -> np.ndarray:
    """Positions (n_atoms, 3; A) of a conformer after a force field moved it: MMFF, or UFF where that lacks a type."""
    fields = rdkit().fields
    known = fields.MMFFHasAllMoleculeParams(molecule)
    (fields.MMFFOptimizeMolecule if known else fields.UFFOptimizeMolecule)(molecule, confId=conformer)
    return np.array(molecule.GetConformer(conformer).GetPositions())


def conformer(smiles: str, seed: int = 0) -> Atoms | None:
    """Any conformer; None if none is found.

    Args:
        smiles: the molecule.
        seed: of the conformer.

    Raises:
        MMEAError: RDKit is not installed, or cannot read the molecule.
    """
    molecule = rdkit().chem.AddHs(read_smiles(smiles))
    number = rdkit().geometry.EmbedMolecule(molecule, randomSeed=seed)
    return None if number < 0 else Atoms(numbers_of(molecule), relax(molecule, number))


def attach(smiles: str, groups: Sequence[str], rng: np.random.Generator) -> str | None:
    """A molecule with groups in the place of hydrogens on carbon; None if these are fewer.

    Args:
        smiles: the molecule.
        groups: as SMILES, bound by their first atoms.
        rng: chooses the hydrogens, at most one of an atom.

    Raises:
        MMEAError: RDKit is not installed, or cannot read a molecule.
    """
    chem, molecule = rdkit().chem, read_smiles(smiles)
    chem.Kekulize(molecule, clearAromaticFlags=True)
    sites = [atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetAtomicNum() == 6 and atom.GetTotalNumHs()]
    if len(groups) > len(sites):
        return None
    for group, site in zip(groups, rng.choice(sites, size=len(groups), replace=False).tolist(), strict=True):
        joined = chem.RWMol(chem.CombineMols(molecule, read_smiles(group)))
        joined.AddBond(site, molecule.GetNumAtoms(), chem.BondType.SINGLE)
        molecule = joined
    chem.SanitizeMol(molecule)
    return str(chem.MolToSmiles(molecule))


__all__ = ["attach", "conformer", "numbers_of", "rdkit", "read_smiles", "relax"]

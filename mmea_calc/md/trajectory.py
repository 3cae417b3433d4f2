"""Trajectories: one HDF5 file per run in the H5MD layout, version 1.1 (de Buyl, Colberg, Höfling, 2014).

A replica is one start structure at one temperature, named `start0-300K-0` (start, temperature, number). In
`RUN/trajectory.h5`:

    h5md/                           attributes version [1, 1]; author/ and creator/ (name, version); modules/units
    parameters/                     attribute config: the settings of the run as JSON (`MDConfig`)
    particles/<replica>/            attributes start_index, temperature_K, replica_index
        box/                        attributes dimension 3, boundary ("periodic" or "none", three of them)
            edges/value             (n_frames, 3, 3), Angstrom, rows are lattice vectors; only with a periodic direction
        species                     (n_atoms,), atomic numbers
        mass                        (n_atoms,), u
        position/value              (n_frames, n_atoms, 3), Angstrom, never wrapped into the cell
        velocity/value              (n_frames, n_atoms, 3), Angstrom fs-1; unless the run was told not to store them
    observables/<replica>/<name>/
        value                       (n_samples,), with a unit attribute; the names are in `OBSERVABLES`

Beside every `value` lie `step` (n,) int64 and `time` (n,) float64, ps; those of one replica's frames are one object
under several names, and so are those of its observables. Frame 0 and sample 0 are step 0. Every frame's step also
has a sample (`stats_every` divides `traj_every`). A replica that failed has fewer of both than the others. A value
that was not measured at a sample (adapted minus bare forces, most of the time) is NaN there.

MDAnalysis' H5MD reader takes the first group of `particles`, and observables by the number of the frame whatever
their steps are. Therefore `RUN/replicas/<replica>.h5md` shows one replica alone, without observables, as
`particles/trajectory`: a few kB of links into `trajectory.h5`, to be opened by MDAnalysis as it is.

The file is complete at every moment. Frames since the last checkpoint are in memory. At a checkpoint they are
appended to a hidden twin, which then takes the visible file's place by a rename, and the file that was visible
becomes the twin (one checkpoint behind, which the next one makes up for). Every frame is therefore written twice.
"""

from __future__ import annotations

# name -> unit, of the observables of a replica
OBSERVABLES: dict[str, str] = {
    "temperature": "K",  # of the velocities at the end of a step; see `mmea_calc.md.state` for degrees of freedom
    "potential_energy": "eV",  # total, reference energies included
    "kinetic_energy": "eV",
    "heat": "eV",  # what the thermostat has put in since step 0
    "conserved_energy": "eV",  # potential + kinetic - heat
    "max_force": "eV Angstrom-1",  # largest force on an atom
    "min_distance_ratio": "1",  # smallest distance of two atoms over the sum of their covalent radii
    "broken_bonds": "1",  # bonds of the start that are open now
    "formed_bonds": "1",  # bonds that the start did not have
    "gate_excess": "1",  # how far a gate is outside the range seen in training, in widths of that range
    "adapted_minus_bare": "eV Angstrom-1",  # root mean square over components of the difference of forces
}

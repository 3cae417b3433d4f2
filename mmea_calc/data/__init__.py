"""Labelled structures: from files to what training and evaluation take.

| step | modules |
|---|---|
| files -> `Dataset`, in memory | `reading`, `dataset` |
| files -> one HDF5 file that is read structure by structure | `preparing`, `prepared` |
| what is wrong with them, told before training | `preflight`, `unit_checks`, `duplicates` |
| energies of isolated atoms, which connect a backbone's energies to the labels' | `reference_energies` |
"""

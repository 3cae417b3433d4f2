"""What a trajectory says: averages with errors, structure, motion, spectra, and one page that shows it all.

Functions of `structure` and `motion` (and of `mmea_calc.statistics`) take arrays, with units in their names, and know
nothing of files; `reader` turns the folder of a run into arrays; `quantities` applies the ones to the other; `report`
writes pictures, tables and the page.
"""

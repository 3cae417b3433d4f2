"""The recipe of the embedded backbones: `mmea pretrain recipe` from end to end, `mmea pretrain STEP` step by step.

Training has stages (`train`): a broad set that is cheap to label (GFN2-xTB) comes first, then a few thousand small
molecules at the level of theory that is wanted (PBE/def2-SVP), with the broad set brought near that level in between
(`relabel`). `widen` gives a network more channels before it is trained further. `choose`, `sample`, `small`,
`chelates`, `label` and `pack` make sets; `report` tells what came of it.
"""

"""The recipe of the embedded backbones: `python -m mmea_calc.pretrain {choose,label,pack,train}`.

Two stages, each a `train`: first a broad set that is cheap to label (GFN2-xTB), then a few hundred small molecules at
the level of theory that is wanted (PBE/def2-SVP). `choose`, `label` and `pack` make sets for the second one.
"""

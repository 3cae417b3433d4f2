"""e3nn, imported without weakening torch's safe loading.

e3nn 0.4.4 keeps its constants in a file that holds a pickled `slice`, which torch >= 2.6 refuses by default. That one
type is allowed, during this import alone. Import e3nn from here.
"""

from __future__ import annotations

import warnings

import torch

with torch.serialization.safe_globals([slice]), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its TorchScript annotations; nothing a user can act on
    from e3nn import o3
    from e3nn.nn import FullyConnectedNet

__all__ = ["FullyConnectedNet", "o3"]

"""Fine-tune MACE potentials with magnitude-modulated equivariant adapters, and run them in ASE.

The names below are imported when they are first used: `import mmea_calc` itself loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapted import attach
    from .adapter_file import read_adapter
    from .backbone import Backbone, load_backbone
    from .calculator import MMEACalculator
    from .config import AdapterConfig, TrainConfig
    from .data.reading import read_dataset
    from .errors import MMEAError
    from .evaluation import evaluate
    from .fast.memory import keep_freed_memory
    from .training.finetuning import finetune

__version__ = "0.1.0"

# public name -> module that has it. No module may bear the name of something public: importing it would hide the other.
_MODULES = {
    "AdapterConfig": "config",
    "Backbone": "backbone",
    "MMEACalculator": "calculator",
    "MMEAError": "errors",
    "TrainConfig": "config",
    "attach": "adapted",
    "evaluate": "evaluation",
    "finetune": "training.finetuning",
    "keep_freed_memory": "fast.memory",
    "load_backbone": "backbone",
    "read_adapter": "adapter_file",
    "read_dataset": "data.reading",
}

__all__ = [
    "AdapterConfig",
    "Backbone",
    "MMEACalculator",
    "MMEAError",
    "TrainConfig",
    "attach",
    "evaluate",
    "finetune",
    "keep_freed_memory",
    "load_backbone",
    "read_adapter",
    "read_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Methods compared: every one trained on the same data with the same seeds, in one table.

published_task(...) or own_task(...) -> run(...) -> write_tables(...) -> draw(...), recommend(...)
"""

from .cells import Cell, CellResult
from .choice import Choice, choose, recommend
from .method_spec import MethodSpec, parse_method
from .picture import draw
from .report import PICTURE, describe, published_sentence, write_tables
from .runner import BenchmarkEvent, plan, run
from .table import ResultTable, build_table
from .tasks import LAYOUTS, System, Task, own_task, published_task

__all__ = [
    "LAYOUTS",
    "PICTURE",
    "BenchmarkEvent",
    "Cell",
    "CellResult",
    "Choice",
    "MethodSpec",
    "ResultTable",
    "System",
    "Task",
    "build_table",
    "choose",
    "describe",
    "draw",
    "own_task",
    "parse_method",
    "plan",
    "published_sentence",
    "published_task",
    "recommend",
    "run",
    "write_tables",
]

"""Methods as they are typed: `mmea`, `mmea:gate_rank=32`, `full:lr=0.001,recipe=paper`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config import AdapterConfig, BenchmarkConfig, TrainConfig, fields_of, setting_types
from ..errors import AdapterError
from ..methods import method_named, unused_settings
from ..setting_values import from_text
from ..training.recipes import RECIPES, recipe_for

PAPER = "paper"

# Given by the benchmark itself, for all methods alike.
_RESERVED = ("method", "seed", "device", "valid_fraction")


@dataclass(frozen=True)
class MethodSpec:
    """A method with its settings.

    Attributes:
        label: the shortest text that gives the same settings; names the method in tables and files.
        adapter, training: settings of it, but for seed and device.
        recipe: which recipe they come from; None: the method's own.
    """

    label: str
    adapter: AdapterConfig
    training: TrainConfig
    recipe: str | None = None

    def seeded(self, seed: int) -> tuple[AdapterConfig, TrainConfig]:
        """The settings of one training."""
        return replace(self.adapter, seed=seed), replace(self.training, seed=seed)


def parse_methods(config: BenchmarkConfig) -> tuple[MethodSpec, ...]:
    """All methods of `config`, each once. Raises AdapterError."""
    if not config.methods:
        raise AdapterError("no method was given: expected at least one, such as mmea")
    specs = [parse_method(text, config) for text in config.methods]
    return tuple({spec.label: spec for spec in specs}.values())


def parse_method(text: str, config: BenchmarkConfig) -> MethodSpec:
    """`NAME` or `NAME:field=value,field=value`; what is named wins over `config`, that over the recipe.

    A value may hold commas: a word without `=` belongs to the field before it.

    Raises:
        AdapterError: an unknown method, recipe or field, or a value of the wrong type.
    """
    name, _, rest = text.strip().partition(":")
    method_named(name)
    named = _named_fields(rest, text) if rest else {}
    recipe = named.pop("recipe", None)
    for wanted in (recipe, config.recipe):
        if wanted is not None and wanted not in RECIPES:
            raise AdapterError(f"unknown recipe {wanted!r}; expected one of {', '.join(RECIPES)}")
    adapter, training = _settings(name, recipe or config.recipe, config, named)
    if unused := sorted(set(unused_settings(adapter)) & named.keys()):
        raise AdapterError(f"{text!r}: method {name} has no use for {', '.join(unused)}; leave it out")
    words = [f"recipe={recipe}"] if recipe not in (None, config.recipe) else []
    for before, now in zip(_settings(name, recipe or config.recipe, config, {}), (adapter, training), strict=True):
        own = [key for key in named if hasattr(now, key)]
        words += [f"{key}={_text(getattr(now, key))}" for key in own if getattr(now, key) != getattr(before, key)]
    return MethodSpec(f"{name}:{','.join(words)}" if words else name, adapter, training, recipe or config.recipe)


def recipe_of(label: str) -> str | None:
    """The recipe that the label of a method names, which comes first in it; None: that of all methods, or its own."""
    key, _, recipe = label.partition(":")[2].partition(",")[0].partition("=")
    return recipe if key == "recipe" else None


def _named_fields(rest: str, text: str) -> dict[str, Any]:
    """Field -> value, in the order of the classes, so that the same settings have the same label."""
    pairs: list[list[str]] = []
    for word in rest.split(","):
        if "=" in word:
            pairs.append([part.strip() for part in word.split("=", 1)])
        elif pairs:
            pairs[-1][1] += "," + word.strip()
        else:
            raise AdapterError(f"{text!r}: expected NAME:field=value,field=value, got {word!r} where a field belongs")
    types = {"recipe": str, **setting_types(without=_RESERVED)}
    values: dict[str, Any] = {}
    for key, value in pairs:
        field = key.replace("-", "_")
        if field not in types:
            raise AdapterError(f"{text!r}: unknown field {key!r}; expected one of {', '.join(types)}")
        try:
            values[field] = from_text(value, types[field])
        except ValueError as problem:
            raise AdapterError(f"{text!r}: {key} {problem}") from problem
    return {field: values[field] for field in types if field in values}


def _settings(
    name: str, recipe: str | None, config: BenchmarkConfig, named: Mapping[str, Any]
) -> tuple[AdapterConfig, TrainConfig]:
    wanted = ("epochs", "dtype", "device", "compile")
    common = {key: getattr(config, key) for key in wanted}
    given = {key: value for key, value in common.items() if value is not None}
    merged = {**recipe_for(name, recipe), **given, **named, "method": name}
    return AdapterConfig(**fields_of(AdapterConfig, merged)), TrainConfig(**fields_of(TrainConfig, merged))


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

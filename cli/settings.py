"""Which value a setting has: a flag, else the --config file, else the recipe, else the default in `mmea_calc.config`.

No default is written down here. An option that was not given is None and is left to the next source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from mmea_calc.config import AdapterConfig, TrainConfig, fields_of, setting_types
from mmea_calc.setting_values import as_type

CONFIG_HINT = "'--config'"


@dataclass(frozen=True)
class Settings:
    """The outcome: settings of the adapter and of the training, and the options that are neither."""

    adapter: AdapterConfig
    training: TrainConfig
    options: dict[str, Any]

    def on(self, device: str) -> Settings:
        """The same, on that device."""
        return replace(self, training=replace(self.training, device=device))


def resolve(flags: Mapping[str, Any], config: Path | None, other_options: Mapping[str, Any]) -> Settings:
    """Merge the sources.

    Args:
        flags: option name with underscores -> value; None for an option that was not given.
        config: YAML file with option names as keys, and any other field of AdapterConfig and TrainConfig.
        other_options: options of the command that are no field of either class, with their types.

    Raises:
        typer.BadParameter: an unknown key, recipe, or a value of the wrong type in the file; a form of the adapter
            other than that of the one to start from.
        AdapterFileError: the adapter to start from cannot be read.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    written = read_config(config, other_options) if config is not None else {}
    if init := given.get("init", written.get("init")):
        written = _form_of(Path(init), {**written, **given}) | written
    method = given.get("method", written.get("method", AdapterConfig.method))
    recipe = _recipe(given.get("recipe", written.get("recipe")), method)
    merged = {**recipe, **written, **given}
    return Settings(
        adapter=AdapterConfig(**fields_of(AdapterConfig, merged)),
        training=TrainConfig(**fields_of(TrainConfig, merged)),
        options={name: merged.get(name) for name in other_options},
    )


def _form_of(init: Path, asked_for: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the adapter to start from, and its head; what was asked for must fit."""
    from mmea_calc.adapter_file import read_adapter
    from mmea_calc.methods import differing_form

    file = read_adapter(init)
    form = file.config.form()
    wanted = replace(file.config, **fields_of(AdapterConfig, asked_for))
    for name in differing_form(wanted, file.config):
        raise typer.BadParameter(
            f"{init} has {name.replace('_', '-')} {form[name]!r}, not {asked_for[name]!r}: leave the option out",
            param_hint="'--init'",
        )
    return {**form, "head": file.head}


def read_config(path: Path, other_options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a YAML file, checked against the types of the fields.

    Raises:
        typer.BadParameter: the file is no mapping, or has an unknown key or a value of the wrong type.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not YAML: {error}", param_hint=CONFIG_HINT) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise typer.BadParameter(
            f"{path} must be a mapping of option names to values, got {type(content).__name__}", param_hint=CONFIG_HINT
        )
    types_of = {**setting_types(), **{name: wanted | None for name, wanted in other_options.items()}}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).removeprefix("--").replace("-", "_")
        switch = name.removeprefix("no_")
        if switch != name and types_of.get(switch) is bool:
            name, value = switch, not coerce(name, value, bool, path)
        if name not in types_of:
            options = ", ".join(sorted(types_of)).replace("_", "-")
            raise typer.BadParameter(f"{path} has the unknown key '{key}'; known: {options}", param_hint=CONFIG_HINT)
        values[name] = coerce(name, value, types_of[name], path)
    return values


def coerce(name: str, value: Any, wanted: Any, source: object) -> Any:
    """`value` as the type that the setting has.

    Raises:
        typer.BadParameter: it cannot be one.
    """
    try:
        return as_type(value, wanted)
    except ValueError as problem:
        raise typer.BadParameter(f"{source}: {name} {problem}", param_hint=CONFIG_HINT) from problem


def _recipe(name: str | None, method: str) -> dict[str, Any]:
    from mmea_calc.training.recipes import RECIPES, recipe_for

    if name is not None and name not in RECIPES:
        raise typer.BadParameter(f"unknown recipe '{name}'; known: {', '.join(RECIPES)}", param_hint="'--recipe'")
    return dict(recipe_for(method, name))

"""Runs beside each other: where their settings differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    >>> flat({"rounds": 3, "local": {"epochs": 1}})
    {'rounds': 3, 'local.epochs': 1}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(configs: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    """Setting -> run -> value, for the settings that are not the same in all; None where a run has none.

    >>> differences({1: {"a": 1, "b": 2}, 2: {"a": 1, "b": 3}})
    {'b': {1: 2, 2: 3}}
    """
    flattened = {run: flat(config) for run, config in configs.items()}
    names = dict.fromkeys(name for config in flattened.values() for name in config)
    rows = {name: {run: config.get(name) for run, config in flattened.items()} for name in names}
    return {name: row for name, row in rows.items() if len({repr(value) for value in row.values()}) > 1}

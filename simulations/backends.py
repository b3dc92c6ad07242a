"""Where virtual devices can train: the names of the backends, checked before anything is prepared."""

from __future__ import annotations

import importlib.util
import os

BACKENDS = "in-process, batched, processes[:COUNT], ray[:COUNT]"
MOST = 1024


class BackendError(ValueError):
    """A backend that does not exist or cannot be used here."""


def parse_backend(backend: str) -> tuple[str, int]:
    """Its kind, and how many processes it has: by default as many as this one may use processors.

    >>> parse_backend("processes:2"), parse_backend("in-process")
    (('processes', 2), ('in-process', 1))

    Raises:
        BackendError: no such backend, or Ray is not installed.
    """
    kind, given, number = backend.partition(":")
    several = kind in ("processes", "ray")
    if not several and (given or kind not in ("in-process", "batched")):
        raise BackendError(f"there is no backend {backend!r}; choose one of {BACKENDS}")
    if given and not (number.isascii() and number.isdigit() and 0 < int(number) <= MOST):
        raise BackendError(f"{backend!r} asks for {number!r} processes; give a whole number from 1 to {MOST}")
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise BackendError("the backend ray needs Ray, which is not installed; run: pip install 'pocketfed[ray]'")
    if given:
        return kind, int(number)
    return kind, len(os.sched_getaffinity(0)) if several and hasattr(os, "sched_getaffinity") else 1

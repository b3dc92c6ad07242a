"""What a device keeps of a run on disk: error feedback's residual, private parameters, control variate, the update under way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pocketfed.client_sdk.home import write_bytes
from pocketfed.client_sdk.outgoing import NOTHING, Kept, UpdateForm
from pocketfed.client_sdk.perform import Reply, split_of
from pocketfed.client_sdk.trainer import Trainer
from pocketfed.model.parameters import ParametersError, Vector, split_private

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """A device's part in a round. assignment: its id and the digest of its parameters; start: those, (P,).

    controlled: the run has a control variate, and the device its own.
    """

    assignment: str
    parameters: str
    run: int
    form: UpdateForm
    start: Vector
    controlled: bool = False

    @property
    def key(self) -> str:
        return f"{self.assignment} {self.parameters}"

    @property
    def leaves_traces(self) -> bool:
        """Made again it would not be the same, or something is to stay."""
        return bool(self.form.how.feeds_back or self.form.private or self.form.noise or self.controlled)


class Keeping:
    """Three files in the device's folder: what error feedback kept, the private parameters, which another run must not
    touch, and the last update with what is to be kept once it has been taken.

    An update is written down before its first byte is sent, and sent again as it is: noise is not drawn twice, and no
    residual is counted twice, wherever the process ends.

    Args:
        taken: asks the coordinator whether an assignment's update counted; None where it does not know any more.
    """

    def __init__(self, home: Path, taken: Callable[[str], bool | None]) -> None:
        self._kept, self._outgoing = home / "kept.safetensors", home / "outgoing.safetensors"
        self._private = home / "private.safetensors"
        self._taken = taken

    def reply(self, part: Part) -> Reply | None:
        """The update for this very assignment, if it was made before."""
        found = _load(self._outgoing)
        if found is None or found[0]["key"] != part.key:
            return None
        told, arrays = found
        kept = Kept(arrays["residual"], arrays["private"], arrays.get("control", NOTHING))
        return Reply(arrays["data"].tobytes(), NOTHING, int(told["num_examples"]), told["metrics"], kept)

    def before(self, trainer: Trainer, part: Part) -> Kept:
        """What is kept of the rounds before.

        Raises:
            LinkError: whether the last update was taken is known to the coordinator alone, and it does not answer.
            ConfigurationError: private parameters that the trainable set does not have.
        """
        if not part.leaves_traces:
            return Kept()
        self._settle()
        split, names = split_of(trainer, part.form), list(part.form.private)
        private, residual, control = NOTHING, NOTHING, NOTHING
        own, kept = _load(self._private), _load(self._kept)
        if own is not None and own[0]["identity"] == trainer.identity:
            # Of other names, or in the place of other values, they are not these.
            fits = own[0]["private"] == names and own[0]["base"] == _digest(split.private(part.start))
            private = own[1]["private"] if fits else NOTHING
        if kept is not None and kept[0]["identity"] == trainer.identity:
            told = kept[0]
            same = (told["run"], told["private"], told["codec"]) == (part.run, names, part.form.codec)
            residual = kept[1]["residual"] if same else NOTHING
            control = kept[1].get("control", NOTHING) if same and part.controlled else NOTHING
        return Kept(residual, private, control)

    def hold(self, trainer: Trainer, part: Part, reply: Reply) -> None:
        """Before the update is sent."""
        if part.leaves_traces:
            told = {
                "key": part.key,
                "assignment": part.assignment,
                "run": part.run,
                "identity": trainer.identity,
                "codec": part.form.codec,
                "private": list(part.form.private),
                "base": _digest(split_of(trainer, part.form).private(part.start)),
                "num_examples": reply.num_examples,
                "metrics": dict(reply.metrics),
            }
            data = np.frombuffer(reply.data, np.uint8)
            kept = {"residual": reply.kept.residual, "private": reply.kept.private, "control": reply.kept.control}
            _save(self._outgoing, told, {"data": data, **kept})

    def settle(self, assignment: str, taken: bool) -> None:
        """The coordinator has said whether it took the update. The update stays until the next: it may be asked for again."""
        found = _load(self._outgoing)
        if found is not None and found[0]["assignment"] == assignment:
            if taken:
                self._keep(*found)
            else:
                self._outgoing.unlink(missing_ok=True)

    def personal(self, trainer: Trainer, theta: Vector) -> Vector:
        """theta with the device's private parameters, where they took the place of those in it; else theta itself."""
        found = _load(self._private)
        if found is None or found[0]["identity"] != trainer.identity:
            return theta
        try:
            split = split_private(trainer.layout, found[0]["private"])
        except ParametersError:
            return theta
        fits = found[0]["base"] == _digest(split.private(theta))
        return split.overlay(theta, found[1]["private"]) if fits else theta

    def forget(self) -> None:
        """Delete what was made of the examples: private parameters, residual, the last update."""
        for path in (self._outgoing, self._private, self._kept):
            path.unlink(missing_ok=True)

    def _settle(self) -> None:
        """The process may have ended before it heard whether its last update was taken."""
        last, kept = _load(self._outgoing), _load(self._kept)
        if last is None or (kept is not None and kept[0]["key"] == last[0]["key"]):
            return
        taken = self._taken(last[0]["assignment"])
        if taken is None and kept is not None:  # in doubt nothing is sent twice
            _save(self._kept, kept[0], {**kept[1], "residual": NOTHING})
        self.settle(last[0]["assignment"], bool(taken))

    def _keep(self, told: Mapping[str, Any], arrays: Arrays) -> None:
        if told["private"]:
            _save(self._private, told, {"private": arrays["private"]})
        stays = {name: arrays[name] for name in ("residual", "control") if name in arrays}
        _save(self._kept, told, stays)  # last: that it is there says that all was kept


def _save(path: Path, told: Mapping[str, Any], arrays: Arrays) -> None:
    text = json.dumps(told)
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(path, save(held, {"told": text, "digest": _digest(text.encode(), *_in_order(held))}))


def _load(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """None where there is nothing, or nothing whole."""
    try:
        with safe_open(str(path), "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata["digest"] != _digest(metadata["told"].encode(), *_in_order(arrays)):
            return None
        return json.loads(metadata["told"]), arrays
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _in_order(arrays: Arrays) -> list[NDArray[Any]]:
    return [arrays[name] for name in sorted(arrays)]


def _digest(*parts: bytes | NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.tobytes())
    return digest.hexdigest()

"""From a trained difference to the bytes that leave the device: private part cut out, clipped, noise, error feedback, codec."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.model.codecs import Codec, decode, encode, parse_codec
from pocketfed.model.parameters import ParametersError, Vector

METRICS = ("loss", "accuracy", "steps", "seconds", "holdout_loss", "truncated", "examples", "correct", "loss_sum")
ROOM = 0.999  # what an update that rounding made longer than it may be is shortened by besides
ROUNDING = 1e-7  # of a norm, relative, in float32
NOTHING: Vector = np.zeros(0, np.float32)


@dataclass(frozen=True)
class UpdateForm:
    """What may leave the device, and in which form; the fields are those of `UpdateForm` in fleet.proto.

    Raises:
        ConfigurationError: a value out of its range, or noise where error feedback would undo or pile it up.
    """

    codec: str = "float32"
    clip_norm: float = 0.0
    noise: float = 0.0
    private: tuple[str, ...] = ()
    metrics: tuple[str, ...] = METRICS
    frozen: tuple[str, ...] = ()
    lora_rank: int = 0

    def __post_init__(self) -> None:
        for name, most in (("clip_norm", 1e18), ("noise", 1000.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= most):
                raise ConfigurationError(f"{name} is {value!r}; it must be a number between 0 and {most:g}")
        if self.noise and (not self.clip_norm or self.how.feeds_back):
            raise ConfigurationError(
                f"noise {self.noise:g} with clip_norm {self.clip_norm:g} and codec {self.codec} cannot be; it needs a "
                "clip_norm, and a codec without error feedback"
            )

    @property
    def how(self) -> Codec:
        try:
            return parse_codec(self.codec)
        except ParametersError as error:
            raise ConfigurationError(f"{error}, or update the app") from None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> UpdateForm:
        """What this version does not know is not ignored: a form is a promise.

        Raises:
            ConfigurationError: an unknown name or a value that cannot be.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigurationError(f"the run asks for a form with {name[:100]!r}; update the app")
        given = {k: tuple(map(str, v)) if k in ("private", "metrics", "frozen") else v for k, v in values.items()}
        made = cls(**given | {"codec": given.get("codec") or "float32"})
        made.how  # noqa: B018 - a codec that this version does not know is refused now, not after training
        return made


@dataclass(frozen=True)
class Kept:
    """What stays on the device from one round of a run to the next.

    residual: of the shared values, what error feedback has still to send. private: their values. control: the device's own
    control variate (SCAFFOLD), (P,). Empty: none yet.
    """

    residual: Vector = field(default_factory=lambda: NOTHING)
    private: Vector = field(default_factory=lambda: NOTHING)
    control: Vector = field(default_factory=lambda: NOTHING)


@dataclass(frozen=True)
class Outgoing:
    """data: what is sent. said: what the coordinator reads from it. residual: what has still to be sent."""

    data: bytes
    said: Vector
    residual: Vector


def make_outgoing(
    form: UpdateForm, shared: Vector, residual: Vector, noise: np.random.Generator | None = None
) -> Outgoing:
    """The shared part of a trained difference, in the run's form. `noise` is needed where the form has some.

    What is sent is never longer than `clip_norm`, but for noise: it is the sum with the residual that is clipped, and what
    clipping cuts off is gone, not postponed. Noise comes after clipping, before any rounding.
    """
    codec = form.how
    vector = shared + residual if residual.size else shared
    vector = clip(vector, form.clip_norm)
    if form.noise:
        if noise is None:
            raise ConfigurationError("the form has noise and no generator was given; give one")
        drawn = noise.standard_normal(vector.size) * (form.noise * form.clip_norm)
        vector = (vector + drawn).astype(np.float32)
    data, said = _coded(codec, vector)
    sent = vector
    while form.clip_norm and not form.noise and norm(said) > form.clip_norm:  # rounding made it longer
        sent = sent * np.float32(ROOM * form.clip_norm / norm(said))
        data, said = _coded(codec, sent)
    return Outgoing(data, said, vector - said if codec.feeds_back else NOTHING)


def _coded(codec: Codec, vector: Vector) -> tuple[bytes, Vector]:
    data = encode(codec, vector)
    return data, vector if codec.kind == "float32" else decode(codec, data, vector.size)


def clip(vector: Vector, most: float) -> Vector:
    """Scaled down to an L2 norm of at most `most`; 0: as it is."""
    length = norm(vector) if most else 0.0
    if length <= most:
        return vector
    clipped: Vector = (vector.astype(np.float64) * (most * (1 - ROUNDING) / length)).astype(np.float32)
    return clipped


def norm(vector: Vector) -> float:
    """The L2 norm, summed in float64."""
    return math.sqrt(float(np.sum(np.square(vector, dtype=np.float64))))

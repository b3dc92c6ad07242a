"""The form that a run's updates come in: how many bytes that can be, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketfed.coordinator.config import UpdateForm
from pocketfed.model.codecs import Codec, decode, encoded_bytes, parse_codec
from pocketfed.model.parameters import Parameter, Split, Vector, split_withheld

FORMS_SINCE = (0, 3)  # the first SDK version whose devices know forms other than the plain one


@dataclass(frozen=True)
class Form:
    """codec: of the shared values; split: which of theta's are shared. The rest of an update is 0: it never left."""

    codec: Codec
    split: Split

    @property
    def most_bytes(self) -> int:
        return encoded_bytes(self.codec, self.split.shared_size)

    @property
    def plain(self) -> bool:
        return self.codec.kind == "float32" and not self.split.ranges

    def read(self, data: bytes) -> Vector:
        """An update (P,) from its bytes.

        Raises:
            ParametersError: they are not of this form.
        """
        return self.split.spread(decode(self.codec, data, self.split.shared_size))


def form_of(update: UpdateForm, trainable_set: Mapping[str, Any]) -> Form:
    """trainable_set: as a manifest describes it.

    Raises:
        ParametersError: private parameters that the set does not have.
    """
    split = Split(int(trainable_set["size"]))
    if update.private or update.frozen or update.lora_rank:
        split = split_withheld(layout_of(trainable_set), update.private, update.frozen, update.lora_rank)
    return Form(parse_codec(update.codec), split)


def layout_of(trainable_set: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """What theta's values are called, as a manifest describes them."""
    return tuple(Parameter(p["name"], tuple(p["shape"]), int(p["offset"])) for p in trainable_set["parameters"])


def read_form(config: Mapping[str, Any], trainable_set: Mapping[str, Any], asked: Mapping[str, Any]) -> Form:
    """Of an assignment of a run as they are stored: what is withheld may differ by round and device, nothing else.

    Runs of before there were forms are plain.
    """
    update = config.get("update", {})
    withheld = {name: asked[f"update.{name}"] for name in ("frozen", "lora_rank") if f"update.{name}" in asked}
    return form_of(UpdateForm(**{**update, **withheld}), trainable_set)


def knows_forms(sdk_version: str) -> bool:
    """
    >>> knows_forms("0.2.9"), knows_forms("0.3.0"), knows_forms("1.0"), knows_forms("")
    (False, True, True, False)
    """
    parts = sdk_version.split(".")[:2]
    return all(p.isascii() and p.isdigit() for p in parts) and tuple(map(int, parts)) >= FORMS_SINCE

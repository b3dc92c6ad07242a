"""The form that a run's updates come in: how many bytes that can be, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketfed.coordinator.config import UpdateForm
from pocketfed.model.codecs import Codec, decode, encoded_bytes, parse_codec
from pocketfed.model.parameters import Parameter, Split, Vector, split_private

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
    if update.private:
        layout = [Parameter(p["name"], tuple(p["shape"]), int(p["offset"])) for p in trainable_set["parameters"]]
        split = split_private(layout, update.private)
    return Form(parse_codec(update.codec), split)


def read_form(config: Mapping[str, Any], trainable_set: Mapping[str, Any]) -> Form:
    """Of a run as it is stored; those of before there were forms are plain."""
    return form_of(UpdateForm(**config.get("update", {})), trainable_set)


def knows_forms(sdk_version: str) -> bool:
    """
    >>> knows_forms("0.2.9"), knows_forms("0.3.0"), knows_forms("1.0"), knows_forms("")
    (False, True, True, False)
    """
    parts = sdk_version.split(".")[:2]
    return all(p.isascii() and p.isdigit() for p in parts) and tuple(map(int, parts)) >= FORMS_SINCE

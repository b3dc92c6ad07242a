"""Whose artifacts this device runs: the publisher's pinned key, the keys it has vouched for, and never backwards.

The publisher's root key is pinned when the device is made, or at the first artifact (over TLS, the coordinator's certificate
vouches for that moment). It signs a list of keys; a key of the list signs "from this sequence on, this channel runs this
version". What is signed is checked as the bytes that came. docs/protocol.md has both statements.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pocketfed.client_sdk.errors import ConfigurationError, UntrustedError

KEYS_TYPE, ARTIFACT_TYPE = "pocketfed keys 1", "pocketfed artifact 1"
MAX_STATEMENT = 64 << 10
MAX_KEYS = 100
_HEX = frozenset("0123456789abcdef")


class Signed(Protocol):
    """`Signed` of distribution.proto."""

    statement: bytes
    signature: bytes


@dataclass(frozen=True)
class Word:
    """A publisher's statement about a version, checked. oldest: what may still be trained on begins there."""

    version: str
    channel: str
    sequence: int
    oldest: int
    key: str


@dataclass
class Held:
    """What the device remembers, as its file has it."""

    publisher: str = ""  # root public key, hex
    list_sequence: int = 0
    keys: dict[str, str] = field(default_factory=dict)  # id -> public key, hex; revoked ones are not in it
    in_use: dict[str, dict[str, Any]] = field(default_factory=dict)  # channel -> the Word of the release in use
    words: dict[str, dict[str, Any]] = field(default_factory=dict)  # version -> its newest Word


class Trust:
    """The pins and marks of one device, kept in a file that is replaced whole.

    Args:
        publisher: the root public key (64 hex digits) to pin; empty: the first one that is met.
        unsigned: run artifacts of a coordinator that has no publisher, as long as none was met.

    Raises:
        ConfigurationError: not a key, or another one than the device has pinned.
    """

    def __init__(self, path: Path, publisher: str = "", unsigned: bool = False) -> None:
        self._path, self._unsigned = path, unsigned
        self._held = _read(path)
        publisher = publisher.lower()
        if publisher and (len(publisher) != 64 or not set(publisher) <= _HEX):
            raise ConfigurationError(
                f"the publisher {publisher[:80]!r} is not a key of 64 hexadecimal digits; see `pocketfed keys list`"
            )
        if publisher and self._held.publisher not in ("", publisher):
            raise ConfigurationError(
                f"this device has pinned the publisher {self._held.publisher[:16]}, not {publisher[:16]}; to trust another, "
                "give it a new home folder"
            )
        self._held.publisher = self._held.publisher or publisher

    @property
    def publisher(self) -> str:
        return self._held.publisher

    @property
    def list_sequence(self) -> int:
        """Of the key list held; 0 for none."""
        return self._held.list_sequence

    def learn_keys(self, signed: Signed) -> None:
        """Take a newer list of keys; an older one changes nothing.

        Raises:
            UntrustedError: not the pinned publisher's, or malformed.
        """
        statement = _statement(signed, KEYS_TYPE)
        try:
            publisher, sequence = str(statement["publisher"]), _sequence(statement["sequence"])
            listed = {str(name): (str(k["public"]), bool(k["revoked"])) for name, k in statement["keys"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UntrustedError(f"the publisher's list of keys is malformed ({error!r}); it is not used") from None
        if self.publisher not in ("", publisher):
            raise UntrustedError(
                f"the list of keys is of publisher {publisher[:16]!r}, but {self.publisher[:16]} is pinned; nothing is taken from it"
            )
        if len(listed) > MAX_KEYS or any(name != key_id(public) for name, (public, _) in listed.items()):
            raise UntrustedError("the publisher's list of keys names a key wrongly, or too many; it is not used")
        _verify(publisher, signed, "the publisher's list of keys")
        if sequence > self.list_sequence:
            self._held.publisher, self._held.list_sequence = publisher, sequence
            self._held.keys = {name: public for name, (public, revoked) in listed.items() if not revoked}
            self._save()

    def learn_version(self, version: str, channel: str, signed: Signed) -> None:
        """Take the publisher's word for a version.

        Raises:
            UntrustedError: a bad signature, an unknown or revoked key, or about something else.
        """
        statement = _statement(signed, ARTIFACT_TYPE)
        for key in self._held.keys:
            try:
                _verify(self._held.keys[key], signed, f"the signature of artifact {version[:12]}")
            except UntrustedError:
                continue
            break
        else:
            raise UntrustedError(
                f"artifact {version[:12]} is signed by none of the {len(self._held.keys)} keys that the publisher "
                f"{self.publisher[:16]} stands for (changed, unknown or revoked); it is not used"
            )
        try:
            sequence, oldest = _sequence(statement["sequence"]), _sequence(statement["oldest"])
            about = (statement["version"], statement["channel"])
        except (KeyError, ValueError) as error:
            raise UntrustedError(
                f"what the publisher says of {version[:12]} is malformed ({error!r}); it is not used"
            ) from None
        if about != (version, channel):
            raise UntrustedError(
                f"the signature is for version {str(about[0])[:12]!r} on {str(about[1])[:100]!r}, not for {version[:12]} on "
                f"{channel!r}; it is not used"
            )
        known = self._held.words.get(version)
        if known is None or sequence > known["sequence"] or known["key"] not in self._held.keys:
            self._held.words[version] = asdict(Word(version, channel, sequence, min(oldest, sequence), key))
            self._save()

    def check(self, version: str, channel: str, release: bool) -> None:
        """May this version be used now: as the model, or only to train in an assignment?

        Raises:
            UntrustedError: the publisher has not said so, its key was revoked, or it would be a step back.
        """
        if not self.publisher:
            if self._unsigned:
                return
            raise UntrustedError(
                f"artifact {version[:12]} comes from another machine and no publisher has signed it; publish it with keys"
            )
        word = self._word(version, channel)
        mark = self._held.in_use.get(channel)
        if mark is None or mark["version"] == version:
            return
        if word.sequence < mark["sequence" if release else "oldest"]:
            raise UntrustedError(
                f"artifact {version[:12]} is older than {mark['version'][:12]}, which this device runs, and the publisher has not "
                "signed that it should go back; it is not used"
            )

    def _word(self, version: str, channel: str) -> Word:
        found = self._held.words.get(version)
        if found is None or found["channel"] != channel:
            raise UntrustedError(
                f"the publisher {self.publisher[:16]} has not signed artifact {version[:12]}; it is not used"
            )
        if found["key"] not in self._held.keys:
            raise UntrustedError(
                f"the key {found['key']} that signed artifact {version[:12]} was revoked; it is not used"
            )
        return Word(**found)

    def adopt(self, version: str, channel: str) -> None:
        """The version is the model in use from now on: nothing older will be."""
        if self.publisher:
            word = self._word(version, channel)
            mark = self._held.in_use.get(channel)
            if mark is None or word.sequence >= mark["sequence"]:
                self._held.in_use[channel] = asdict(word)
                self._save()

    def forget(self, keep: set[str]) -> None:
        """Drop what was said of versions that are not on the device any more."""
        kept = {version: word for version, word in self._held.words.items() if version in keep}
        if kept != self._held.words:
            self._held.words = kept
            self._save()

    def _save(self) -> None:
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps(asdict(self._held)))
        os.replace(partial, self._path)


def _read(path: Path) -> Held:
    """
    Raises:
        ConfigurationError: damaged. To go on without what it said would be to trust anybody again.
    """
    try:
        return Held(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Held()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} is not readable ({error}); give the device a new home folder") from None


def key_id(public: str) -> str:
    """A short name for a public key, as lists and errors show it; empty for what is no key."""
    if len(public) != 64 or not set(public) <= _HEX:
        return ""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:16]


def _sequence(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise ValueError(f"{value!r} is no sequence")
    return value


def _statement(signed: Signed, kind: str) -> dict[str, Any]:
    if not 0 < len(signed.statement) <= MAX_STATEMENT:
        raise UntrustedError(f"a statement of {len(signed.statement)} bytes is not one of a publisher; it is not used")
    try:
        statement = json.loads(signed.statement)
        if not isinstance(statement, dict) or statement["type"] != kind:
            raise ValueError(f"expected {kind!r}")
    except (ValueError, KeyError, RecursionError) as error:
        raise UntrustedError(
            f"what should be the publisher's statement is not ({str(error)[:100]}); it is not used"
        ) from None
    return statement


def _verify(public: str, signed: Signed, what: str) -> None:
    from nacl.exceptions import BadSignatureError
    from nacl.signing import VerifyKey

    try:
        VerifyKey(bytes.fromhex(public)).verify(signed.statement, signed.signature)
    except (BadSignatureError, ValueError):  # the latter: not of an Ed25519 key's or signature's length
        raise UntrustedError(f"{what} is not signed by {key_id(public) or public[:16]!r}; it is not used") from None

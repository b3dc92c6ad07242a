"""The publisher's keys and what they sign: lists of keys, and which version a channel runs.

A root key signs nothing but lists of signing keys; it can be kept off this machine. A signing key says "from this sequence on,
this channel runs this version". Devices pin the root's public key, so signing keys come and go without an update of the app.
What is signed travels and is stored as the bytes that were signed: nobody has to write JSON the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.operators import local_admin, record
from pocketfed.coordinator.store import KeyList, Release, Signature, Store

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEYS_TYPE, ARTIFACT_TYPE = "pocketfed keys 1", "pocketfed artifact 1"
ROOT_FILE = "root.key"


class SigningError(RuntimeError):
    """Keys that are not there, do not belong to this fleet, or may not sign."""


@dataclass(frozen=True)
class Keys:
    """A folder of private keys. root: None where it is kept elsewhere; signing: id -> key, by when they were made."""

    folder: Path
    root: Ed25519PrivateKey | None
    signing: Mapping[str, Ed25519PrivateKey]


def keys_folder(store: Store) -> Path:
    """Beside the database where that is a file, else in the working folder."""
    return store.file.with_name(store.file.name + ".keys") if store.file else Path("pocketfed.keys").absolute()


def public_hex(key: Ed25519PrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def key_id(public: str) -> str:
    """A short name for a public key (hex), as lists and errors show it."""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:16]


# ---- keys on disk ----------------------------------------------------------------------------------------------------


def open_keys(folder: Path) -> Keys:
    """
    Raises:
        SigningError: no keys there, or files that are none.
    """
    files = sorted(folder.glob("signing-*.key"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    root = folder / ROOT_FILE
    if not files and not root.is_file():
        raise SigningError(
            f"there are no publisher's keys in {folder}; make them with `pocketfed keys create`, or give --keys"
        )
    loaded = [_load(p) for p in files]
    return Keys(folder, _load(root) if root.is_file() else None, {key_id(public_hex(k)): k for k in loaded})


def _load(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise SigningError(f"{path} is not a readable key ({error}); put the publisher's key there") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{path} is not an Ed25519 key; put the publisher's key there")
    return key


def _make(folder: Path, name: str = "") -> Ed25519PrivateKey:
    """A new key on disk, for its owner's eyes only; by default a signing key named by its id."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / (name or f"signing-{key_id(public_hex(key))}.key")
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        stream.flush()
        os.fsync(stream.fileno())
    return key


# ---- lists of keys ---------------------------------------------------------------------------------------------------


def newest_list(session: Session) -> KeyList | None:
    return session.scalars(sa.select(KeyList).order_by(KeyList.sequence.desc()).limit(1)).first()


def listed_keys(row: KeyList | None) -> dict[str, dict[str, Any]]:
    """id -> {"public", "revoked"}, in the order they were made."""
    return dict(json.loads(row.statement)["keys"]) if row is not None else {}


def create_keys(session: Session, folder: Path) -> Keys:
    """A root key and a first signing key, announced in a signed list.

    Raises:
        SigningError: the fleet has a publisher, or the folder has keys.
    """
    held = newest_list(session)
    if held is not None:
        raise SigningError(
            f"this fleet has the publisher {held.publisher[:16]} already; `pocketfed keys rotate` gives it another signing key"
        )
    if (folder / ROOT_FILE).exists() or any(folder.glob("signing-*.key")):
        keys = open_keys(folder)  # made for another database, or a transaction that failed
    else:
        root, first = _make(folder, ROOT_FILE), _make(folder)
        keys = Keys(folder, root, {key_id(public_hex(first)): first})
    if not keys.signing:
        raise SigningError(f"{folder} has a root key and no signing key; put one there or give another folder")
    _announce(session, keys, {i: {"public": public_hex(k), "revoked": False} for i, k in keys.signing.items()})
    return keys


def ensure_keys(session: Session, folder: Path) -> Keys:
    """The fleet's keys, made where there are none yet: a first fleet need not know of them.

    Raises:
        SigningError: the fleet has a publisher whose keys are not in the folder.
    """
    if newest_list(session) is None:
        record(session, local_admin().name, "key.create", str(folder), "done", "there were none yet")
        return create_keys(session, folder)
    keys = open_keys(folder)
    current_key(session, keys)
    return keys


def current_key(session: Session, keys: Keys) -> tuple[str, Ed25519PrivateKey]:
    """The newest listed key that is not revoked and is held here: the one to sign with.

    Raises:
        SigningError: there is none.
    """
    held = newest_list(session)
    for name, entry in reversed(listed_keys(held).items()):
        if not entry["revoked"] and name in keys.signing:
            return name, keys.signing[name]
    publisher = held.publisher[:16] if held else "?"
    raise SigningError(
        f"no signing key of the publisher {publisher} is in {keys.folder}; give --keys FOLDER that has one"
    )


def rotate_keys(session: Session, keys: Keys) -> Keys:
    """One more signing key, to sign with from now on. Older ones stay good until they are revoked."""
    listed = listed_keys(newest_list(session))
    _require_root(session, keys)
    made = _make(keys.folder)
    name = key_id(public_hex(made))
    _announce(session, keys, {**listed, name: {"public": public_hex(made), "revoked": False}})
    return Keys(keys.folder, keys.root, {**keys.signing, name: made})


def revoke_signing_key(session: Session, keys: Keys, name: str) -> Keys:
    """What that key has signed is refused from now on; where no other is left to sign with, one is made.

    Raises:
        SigningError: there is no such key, or the root key is not here.
    """
    listed = listed_keys(newest_list(session))
    if name not in listed:
        raise SigningError(
            f"there is no key {name[:80]!r}, only {', '.join(listed) or 'none at all'}; see `pocketfed keys list`"
        )
    _require_root(session, keys)
    listed[name] = {**listed[name], "revoked": True}
    _announce(session, keys, listed)
    if not any(i in keys.signing and not entry["revoked"] for i, entry in listed.items()):
        return rotate_keys(session, keys)
    return keys


def _require_root(session: Session, keys: Keys) -> Ed25519PrivateKey:
    held = newest_list(session)
    if keys.root is None or (held is not None and public_hex(keys.root) != held.publisher):
        whose = held.publisher[:16] if held else "?"
        raise SigningError(
            f"the root key of the publisher {whose} is not in {keys.folder}; it alone signs lists of keys"
        )
    return keys.root


def _announce(session: Session, keys: Keys, listed: Mapping[str, Mapping[str, Any]]) -> None:
    held = newest_list(session)
    root = _require_root(session, keys)
    statement = {
        "type": KEYS_TYPE,
        "sequence": _next_sequence(held.sequence if held else 0),
        "publisher": public_hex(root),
        "keys": listed,
    }
    data = json.dumps(statement).encode()
    session.add(
        KeyList(
            sequence=statement["sequence"], publisher=statement["publisher"], statement=data, signature=root.sign(data)
        )
    )
    session.flush()


def _next_sequence(last: int) -> int:
    """Grows, also after the database was restored from an older copy: devices refuse what does not."""
    return max(last + 1, time.time_ns() // 1_000_000)


# ---- versions --------------------------------------------------------------------------------------------------------


def newest_signature(session: Session, channel: str, version: str | None = None) -> Signature | None:
    """What devices may be told; a way back that is still withheld is not."""
    rows = sa.select(Signature).where(Signature.channel == channel, Signature.withheld_for.is_(None))
    if version is not None:
        rows = rows.where(Signature.artifact_version == version)
    return session.scalars(rows.order_by(Signature.sequence.desc()).limit(1)).first()


def sign_version(
    session: Session,
    keys: Keys,
    channel: str,
    version: str,
    *,
    rollback: bool = False,
    supersede: bool = False,
    follows: str | None = None,
) -> Signature:
    """Say that a channel runs a version from now on. What it ran before may still be trained on, until the next one.

    Args:
        rollback: go back to a version that another has followed.
        supersede: what came before is not trained on any more either (it has a fault).
        follows: the version that it follows, by default the newest: what was released since, in stages, may end before this.

    Raises:
        SigningError: no key to sign with, or an older version without `rollback`.
    """
    newest, before = newest_signature(session, channel), newest_signature(session, channel, version)
    if before is not None and newest is not None and newest.artifact_version != version and not rollback:
        raise SigningError(
            f"{version[:12]} was followed by {newest.artifact_version[:12]} on {channel!r}; devices refuse to go back unless "
            "told so: use `pocketfed release rollback`"
        )
    parent = (newest_signature(session, channel, follows) if follows is not None else None) or newest
    oldest = parent.sequence if parent is not None and not supersede else None
    return _sign(session, keys, channel, version, oldest, rollback)


def _sign(
    session: Session,
    keys: Keys,
    channel: str,
    version: str,
    oldest: int | None,
    rollback: bool,
    withheld_for: int | None = None,
) -> Signature:
    """oldest: sequence of what may still be trained on; None: nothing before this."""
    name, key = current_key(session, keys)
    last = session.scalar(sa.select(sa.func.max(Signature.sequence)).where(Signature.channel == channel)) or 0
    sequence = _next_sequence(last)
    statement = {
        "type": ARTIFACT_TYPE,
        "channel": channel,
        "version": version,
        "sequence": sequence,
        "oldest": sequence if oldest is None else oldest,
        "rollback": rollback,
    }
    data = json.dumps(statement).encode()
    row = Signature(
        channel=channel,
        sequence=sequence,
        artifact_version=version,
        key=name,
        statement=data,
        signature=key.sign(data),
        withheld_for=withheld_for,
    )
    session.add(row)
    session.flush()
    return row


def sign_again(session: Session, keys: Keys) -> list[str]:
    """Sign what every channel runs anew where its key was revoked. Returns those channels."""
    listed = listed_keys(newest_list(session))
    done = []
    for channel in session.scalars(sa.select(Signature.channel).distinct()).all():
        words = _words_in_use(session, channel)
        if any(listed.get(word.key, {}).get("revoked", True) for word in words):
            oldest = None
            for word in words:
                again = _sign(
                    session, keys, channel, word.artifact_version, None if word.withheld_for else oldest,
                    word.withheld_for is not None, word.withheld_for,
                )  # fmt: skip
                oldest = oldest or again.sequence
                if word.withheld_for:
                    session.delete(word)
            done.append(channel)
    return done


def _words_in_use(session: Session, channel: str) -> list[Signature]:
    """The newest word on every version that the channel's devices run, in their order; a withheld way back is the last."""
    open_ = sa.select(Release.artifact_version).where(
        Release.channel == channel, Release.state.in_(("staged", "live", "paused"))
    )
    words = {w.sequence: w for v in session.scalars(open_) if (w := newest_signature(session, channel, v))}
    newest = newest_signature(session, channel)
    if newest is not None:
        words[newest.sequence] = newest
    withheld = sa.select(Signature).where(Signature.channel == channel, Signature.withheld_for.is_not(None))
    return [words[sequence] for sequence in sorted(words)] + list(session.scalars(withheld))


# ---- the way back from a release -------------------------------------------------------------------------------------


def sign_way_back(session: Session, keys: Keys, release: Release, version: str) -> Signature:
    """Sign beforehand that devices may go back to a version, since the coordinator that halts a release has no key.

    It is handed to no device before that. Sign it right after the release's own version: what comes later counts more.
    """
    return _sign(session, keys, release.channel, version, None, True, release.id)


def hand_out_way_back(session: Session, release_id: int) -> bool:
    """From now on devices are told. False if none was signed."""
    found = session.scalars(sa.select(Signature).where(Signature.withheld_for == release_id)).all()
    for row in found:
        row.withheld_for = None
    return bool(found)


def drop_way_back(session: Session, release_id: int) -> None:
    """It will not be needed, and nobody should find it."""
    session.execute(sa.delete(Signature).where(Signature.withheld_for == release_id))

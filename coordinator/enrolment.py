"""Who may come in: enrolling devices and recognising their tokens."""

from __future__ import annotations

import hashlib
import hmac
from datetime import timedelta

import sqlalchemy as sa

from pocketfed.coordinator.store import Device, Store, now, printable

MAX_NAME = 100
MIN_TOKEN, MAX_TOKEN = 32, 200


class EnrolmentError(Exception):
    """An enrolment that is refused. `kind` is invalid, exists or denied."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def enrol(store: Store, name: str, channel: str, sdk_version: str, token: str, key: str, expected_key: str) -> None:
    """Make a device known by the token it has made, of which only the hash is kept; once, however often it is asked.

    Raises:
        EnrolmentError: wrong key, unusable name, or a name that another device has.
    """
    if expected_key and not hmac.compare_digest(key.encode(), expected_key.encode()):
        raise EnrolmentError("denied", "the enrolment key is wrong; ask the operator for the current one")
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise EnrolmentError("invalid", f"the name {name[:MAX_NAME]!r} must have 1 to {MAX_NAME} printable characters")
    if len(channel) > MAX_NAME or not channel.isprintable():
        raise EnrolmentError(
            "invalid", f"the channel {channel[:MAX_NAME]!r} must have at most {MAX_NAME} printable characters"
        )
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN or not token.isascii() or not token.isprintable():
        raise EnrolmentError("invalid", f"the token must have {MIN_TOKEN} to {MAX_TOKEN} printable ASCII characters")
    try:
        with store.write() as session:
            other = session.scalars(sa.select(Device.name).where(Device.token_hash == hash_token(token))).first()
            if other not in (None, name):
                raise EnrolmentError("invalid", "the token is another device's; every device makes a random one")
            session.add(
                Device(
                    name=name,
                    channel=channel or "stable",
                    token_hash=hash_token(token),
                    sdk_version=printable(sdk_version, 50),
                    last_seen_at=now(),
                )
            )
    except sa.exc.IntegrityError:
        with store.read() as session:
            known = session.scalars(sa.select(Device.token_hash).where(Device.name == name)).first()
        if known is None or not hmac.compare_digest(known, hash_token(token)):
            raise EnrolmentError(
                "exists", f"a device named {name!r} is enrolled already; use its home folder, or another name"
            ) from None


def authenticate(store: Store, token: str) -> tuple[int, str] | None:
    """(device id, channel) of a token, or None."""
    if not token:
        return None
    with store.read() as session:
        row = session.execute(
            sa.select(Device.id, Device.channel).where(Device.token_hash == hash_token(token))
        ).first()
    return None if row is None else (row.id, row.channel)


def mark_seen(store: Store, device_id: int, examples: int, sdk_version: str, stays_s: float) -> None:
    """A device has come and stays for so long."""
    with store.write() as session:
        session.execute(
            sa.update(Device)
            .where(Device.id == device_id)
            .values(
                last_seen_at=now(),
                present_until=now() + timedelta(seconds=stays_s),
                examples=min(examples, 2**31 - 1),
                sdk_version=printable(sdk_version, 50),
            )
        )


def mark_gone(store: Store, device_id: int) -> None:
    """A device's connection has ended."""
    with store.write() as session:
        session.execute(sa.update(Device).where(Device.id == device_id).values(present_until=now()))

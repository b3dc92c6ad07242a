"""Who may come in: enrolment keys, enrolling devices, recognising and revoking their credentials."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import (
    Assignment,
    Device,
    EnrolmentKey,
    Round,
    Store,
    UtcDateTime,
    now,
    printable,
)

MAX_NAME = 100
MIN_TOKEN, MAX_TOKEN = 32, 200
MAX_QUOTA = 10_000_000


class EnrolmentError(Exception):
    """An enrolment that is refused. `kind` is invalid, exists or denied."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


# ---- enrolment keys --------------------------------------------------------------------------------------------------


def create_key(
    session: Session, quota: int, expires_at: datetime | None = None, cohort: str = "", round_cap: int = 0
) -> tuple[int, str]:
    """An enrolment key's number and the key itself, which is told this once: only its hash is kept.

    Args:
        quota: devices that may enrol with it. round_cap: at most so many of them in one round, 0 for no limit.

    Raises:
        EnrolmentError: numbers or a name that cannot be.
    """
    if not 0 < quota <= MAX_QUOTA:
        raise EnrolmentError("invalid", f"the quota is {quota}; give 1 to {MAX_QUOTA} devices")
    if round_cap < 0:
        raise EnrolmentError("invalid", f"the cap is {round_cap} devices a round; give 0 for none, or more")
    if len(cohort) > MAX_NAME or not cohort.isprintable():
        raise EnrolmentError(
            "invalid", f"the cohort {cohort[:MAX_NAME]!r} must have at most {MAX_NAME} printable characters"
        )
    if expires_at is not None and expires_at <= now():
        raise EnrolmentError(
            "invalid", f"the key would have expired at {expires_at:%Y-%m-%d %H:%M} UTC; give a later time"
        )
    key = secrets.token_urlsafe(24)
    row = EnrolmentKey(key_hash=hash_token(key), quota=quota, cohort=cohort, round_cap=round_cap, expires_at=expires_at)
    session.add(row)
    session.flush()
    return row.id, key


def revoke_key(session: Session, key_id: int) -> None:
    """No more devices with that key; those that came with it stay.

    Raises:
        EnrolmentError: there is no such key.
    """
    found = session.get(EnrolmentKey, key_id)
    if found is None:
        raise EnrolmentError(
            "invalid", f"there is no enrolment key {key_id}; `pocketfed enrolment-key list` names them"
        )
    found.revoked_at = found.revoked_at or now()


def enrolment_keys(session: Session) -> list[EnrolmentKey]:
    return list(session.scalars(sa.select(EnrolmentKey).order_by(EnrolmentKey.id)))


def newest_devices(session: Session, most: int) -> list[Device]:
    return list(session.scalars(sa.select(Device).order_by(Device.id.desc()).limit(most)))


def _use_key(session: Session, key: str) -> EnrolmentKey:
    """The key's row, counted once more; locked until the transaction ends, so that a quota of one lets one in.

    Raises:
        EnrolmentError: unknown, revoked, expired or used up.
    """
    row = session.scalars(
        sa.select(EnrolmentKey).where(EnrolmentKey.key_hash == hash_token(key)).with_for_update()
    ).first()
    if row is None or row.revoked_at is not None:
        raise EnrolmentError("denied", "the enrolment key is wrong; ask the operator for the current one")
    if row.expires_at is not None and row.expires_at <= now():
        raise EnrolmentError(
            "denied", f"the enrolment key expired at {row.expires_at:%Y-%m-%d %H:%M} UTC; ask for a new one"
        )
    if row.used >= row.quota:
        raise EnrolmentError("denied", f"the enrolment key has let in its {row.quota} devices; ask for a new one")
    row.used += 1
    return row


# ---- devices ---------------------------------------------------------------------------------------------------------


def enrol(
    store: Store,
    name: str,
    channel: str,
    sdk_version: str,
    token: str,
    key: str = "",
    expected_key: str = "",
    key_needed: bool = False,
) -> None:
    """Make a device known by the token it has made, of which only the hash is kept; once, however often it is asked.

    Args:
        expected_key: one that lets anybody in, beside those of the store.
        key_needed: a key is asked for even where there is none yet.

    Raises:
        EnrolmentError: wrong key, unusable name, or a name that another device has.
    """
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise EnrolmentError("invalid", f"the name {name[:MAX_NAME]!r} must have 1 to {MAX_NAME} printable characters")
    if len(channel) > MAX_NAME or not channel.isprintable():
        raise EnrolmentError(
            "invalid", f"the channel {channel[:MAX_NAME]!r} must have at most {MAX_NAME} printable characters"
        )
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN or not token.isascii() or not token.isprintable():
        raise EnrolmentError("invalid", f"the token must have {MIN_TOKEN} to {MAX_TOKEN} printable ASCII characters")
    digest = hash_token(token)
    try:
        with store.write() as session:
            other = session.execute(
                sa.select(Device.name, Device.revoked_at).where(Device.token_hash == digest)
            ).first()
            if other is not None and other.name != name:
                raise EnrolmentError("invalid", "the token is another device's; every device makes a random one")
            if other is not None:
                if other.revoked_at is not None:
                    raise EnrolmentError("denied", "this device was revoked; ask the operator")
                return  # the reply was lost: nothing is counted twice
            master = bool(expected_key) and hmac.compare_digest(key.encode(), expected_key.encode())
            asked = key_needed or bool(expected_key) or session.scalars(sa.select(EnrolmentKey.id).limit(1)).first()
            row = _use_key(session, key) if asked and not master else None
            session.add(
                Device(
                    name=name,
                    channel=channel or "stable",
                    token_hash=digest,
                    sdk_version=printable(sdk_version, 50),
                    last_seen_at=now(),
                    enrolment_key_id=row.id if row else None,
                    cohort=row.cohort if row else None,
                )
            )
    except sa.exc.IntegrityError:
        with store.read() as session:
            known = session.scalars(sa.select(Device.token_hash).where(Device.name == name)).first()
        if known is None or not hmac.compare_digest(known, digest):
            raise EnrolmentError(
                "exists", f"a device named {name!r} is enrolled already; use its home folder, or another name"
            ) from None


def authenticate(store: Store, hashes: Sequence[str]) -> list[tuple[int, str] | Exception | None]:
    """(device id, channel) for each hash of a token, or None; a revoked device is not known either."""
    with store.read() as session:
        columns = sa.select(Device.token_hash, Device.id, Device.channel)
        rows = session.execute(columns.where(Device.token_hash.in_(hashes), Device.revoked_at.is_(None)))
        known = {row.token_hash: (row.id, row.channel) for row in rows}
    return [known.get(token_hash) for token_hash in hashes]


def revoke_device(session: Session, name: str) -> None:
    """Its next call is refused, and it is sampled no more. What it has handed in already stays.

    Raises:
        EnrolmentError: there is no such device.
    """
    device = session.scalars(sa.select(Device).where(Device.name == name)).first() if name.isprintable() else None
    if device is None:
        raise EnrolmentError("invalid", f"there is no device {name[:MAX_NAME]!r}; `pocketfed devices list` names them")
    device.revoked_at, device.examples = device.revoked_at or now(), 0


def capped(session: Session, online: Mapping[int, str]) -> dict[int, str]:
    """`online` (device id -> name) with at most `round_cap` devices of each enrolment key, the next ones each round.

    Ten thousand devices that one leaked key let in are no more of a round than its cap. Those that work still, as they do
    from buffer to buffer, count.
    """
    limited = session.execute(sa.select(EnrolmentKey.id, EnrolmentKey.round_cap).where(EnrolmentKey.round_cap > 0))
    caps = {row.id: row.round_cap for row in limited}
    if not caps:
        return dict(online)
    came = session.execute(sa.select(Device.id, Device.enrolment_key_id).where(Device.enrolment_key_id.in_(caps)))
    came_with = {row.id: row.enrolment_key_id for row in came}
    start = session.scalar(sa.select(sa.func.count()).select_from(Round)) or 0
    at_work = set(
        session.scalars(sa.select(Assignment.device_id).where(Assignment.status.in_(("offered", "accepted"))))
    )
    kept, groups = at_work & came_with.keys(), dict[int, list[int]]()
    places = {key_id: caps[key_id] - sum(came_with[d] == key_id for d in kept) for key_id in caps}
    for device_id in sorted(online.keys() - at_work, key=lambda d: online[d]):
        key_id = came_with.get(device_id)
        if key_id is not None:
            groups.setdefault(key_id, []).append(device_id)
    kept |= {
        group[(start * caps[key_id] + i) % len(group)]
        for key_id, group in groups.items()
        for i in range(min(places[key_id], len(group)))
    }
    return {d: name for d, name in online.items() if came_with.get(d) is None or d in kept}


@dataclass(frozen=True)
class Seen:
    """A device is there until `until`. told: its check-in; None: it said nothing, its connection has ended."""

    device_id: int
    until: datetime
    told: Any


def mark_seen(session: Session, seen: Sequence[Seen]) -> None:
    """Write down who is there, and until when."""
    moment, device = now(), sa.bindparam("device", type_=sa.Integer)
    came = [
        {
            "device": s.device_id,
            "until": s.until,
            "now": moment,
            "labelled": min(s.told.examples, 2**31 - 1),
            "version": printable(s.told.sdk_version, 50),
            "kind": printable(s.told.tier, 50).strip() or None,
        }
        for s in seen
        if s.told is not None
    ]
    gone = [{"device": s.device_id, "until": s.until} for s in seen if s.told is None]
    table, until = cast(sa.Table, Device.__table__), sa.bindparam("until", type_=UtcDateTime)
    if came:
        told = {"last_seen_at": sa.bindparam("now", type_=UtcDateTime), "examples": sa.bindparam("labelled")}
        told |= {"present_until": until, "sdk_version": sa.bindparam("version"), "tier": sa.bindparam("kind")}
        session.connection().execute(sa.update(table).where(table.c.id == device).values(told), came)
    if gone:
        session.connection().execute(sa.update(table).where(table.c.id == device).values(present_until=until), gone)

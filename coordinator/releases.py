"""What a channel's devices run: releases made, given to more and more of them, and taken back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.operators import record
from pocketfed.coordinator.rollout import ReleaseError, Rollout, bucket, check_percent, sdk_fits
from pocketfed.coordinator.signing import Keys, drop_way_back, hand_out_way_back, newest_list, sign_version
from pocketfed.coordinator.store import (
    Device,
    Release,
    ReleaseEvent,
    ReleaseReport,
    latest_release,
    printable,
)

log = logging.getLogger("pocketfed.coordinator")

OPEN = ("staged", "live", "paused")
# What a release may become from what it is.
RELEASE_MOVES: Mapping[str, tuple[str, ...]] = {
    "staged": ("staged", "live", "paused", "halted", "superseded", "rolled_back"),
    "paused": ("staged", "live", "halted", "superseded", "rolled_back"),
    "live": ("halted", "superseded", "rolled_back"),
}
MAX_ID = 1 << 31


# ---- making one ------------------------------------------------------------------------------------------------------


def add_release(session: Session, release: Release, rollout: Rollout, who: str) -> Release:
    """Give it to the channel: at once, or in stages. It ends the stages of one before.

    Raises:
        ReleaseError: it is to go out in stages, and there is nothing that the other devices could run meanwhile.
    """
    lock_channel(session, release.channel)
    parent = parent_for(session, release.channel, rollout)
    if parent is None and rollout.percent < 100:
        live = latest_release(session, release.channel)
        raise ReleaseError(
            f"nothing is live on {release.channel!r} that the other devices could run; the first release goes to all of them"
            if live is None
            else f"nothing live on {release.channel!r} is for the same versions of the SDK, to compare it with and to go back "
            f"to; give --min-sdk {live.min_sdk or 'none'} and --max-sdk {live.max_sdk or 'none'} of release {live.id}"
        )
    release.state, release.percent = ("live" if rollout.percent == 100 else "staged"), rollout.percent
    release.parent_id = parent.id if parent is not None else None
    release.margin, release.loss_margin = rollout.margin, rollout.loss_margin
    release.min_devices = rollout.watched_by if parent is not None else 0
    release.automatic, release.min_sdk, release.max_sdk = rollout.automatic, rollout.min_sdk, rollout.max_sdk
    session.add(release)
    session.flush()
    _tell(session, release, who, "")
    _supersede(session, release, who)
    return release


def parent_for(session: Session, channel: str, rollout: Rollout) -> Release | None:
    """What a new release is compared with and taken back to: live, and for all devices that the new one is for."""
    sdks = (rollout.min_sdk, rollout.max_sdk)
    fitting = (r for r in open_releases(session, channel) if (r.min_sdk, r.max_sdk) in (("", ""), sdks))
    return next((r for r in fitting if r.state == "live"), None)


def _tell(session: Session, release: Release, who: str, reason: str) -> None:
    session.add(
        ReleaseEvent(
            release_id=release.id,
            state=release.state,
            percent=release.percent,
            who=printable(who, 120),
            reason=printable(reason, 500),
        )
    )
    session.flush()


def become(session: Session, release: Release, state: str, who: str, reason: str, percent: float = 0.0) -> None:
    """
    Raises:
        ReleaseError: it cannot become that from what it is.
    """
    if state not in RELEASE_MOVES.get(release.state, ()):
        raise ReleaseError(
            f"release {release.id} is {release.state} and cannot become {state}; `pocketfed release list` shows what is open"
        )
    release.state, release.percent = state, percent or release.percent
    if state in ("superseded", "rolled_back"):
        drop_way_back(session, release.id)
    _tell(session, release, who, reason)
    if state == "live":
        _supersede(session, release, who)


def _supersede(session: Session, release: Release, who: str) -> None:
    """What came before ends: its stages in any case, and what is live if all devices that have it get the new one."""
    sdks = (release.min_sdk, release.max_sdk)
    for before in open_releases(session, release.channel):
        follows_live = release.state == "live" and sdks in (("", ""), (before.min_sdk, before.max_sdk))
        if before.id < release.id and (before.state != "live" or follows_live):
            become(session, before, "superseded", who, f"followed by release {release.id}")


def lock_channel(session: Session, channel: str) -> None:
    """Until the transaction ends nobody else changes what is open there; to be called before it is looked at."""
    if (
        session.get_bind().dialect.name == "postgresql"
    ):  # SQLite's writes begin immediate; rows to come cannot be locked
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(channel))))


def open_releases(session: Session, channel: str) -> list[Release]:
    """Those that devices may hold or get, the newest first."""
    rows = sa.select(Release).where(Release.channel == channel, Release.state.in_(OPEN))
    return list(session.scalars(rows.order_by(Release.id.desc())))


# ---- whose turn it is ------------------------------------------------------------------------------------------------


def release_for(
    session: Session,
    channel: str,
    name: str,
    sdk: str,
    known: int = 0,
    runs: int | None = None,
    among: Sequence[Release] | None = None,
) -> tuple[Release | None, str]:
    """The newest release that covers a device, if newer than the one it knows; and why it does not get a newer one yet.

    Args:
        known: the newest release that the device has heard of, refused ones too. runs: the one that it runs.
        among: the channel's open releases, newest first, where they have been read already.
    """
    why = ""
    for release in open_releases(session, channel) if among is None else among:
        if release.id <= known:
            break
        if release.state == "paused" or bucket(channel, name) >= release.percent:
            continue
        if not sdk_fits(sdk, release.min_sdk, release.max_sdk):
            why = why or f"release {release.id} is for {_range(release)}, not {printable(sdk, 20)!r}: update the app"
            continue
        held = session.get(Release, runs) if runs and release.undoes_id is not None else None
        if held is None or content(release) != content(held):  # else nothing was undone here
            return release, why
    return None, why


def _range(release: Release) -> str:
    least = f" {release.min_sdk}" if release.min_sdk else ""
    most = f" up to {release.max_sdk}" if release.max_sdk else " or newer"
    return f"SDK{least}{most}"


def content(release: Release) -> tuple[str, str, str]:
    return release.artifact_version, release.trainable_set, release.parameters


# ---- changing its course ---------------------------------------------------------------------------------------------


def halt(session: Session, release: Release, reason: str) -> Release:
    """Nobody gets it any more, and those that have it get its parent again: as a new release, since devices go by numbers."""
    parent = session.get_one(Release, release.parent_id)
    become(session, release, "halted", "coordinator", reason)
    handed_out = hand_out_way_back(session, release.id)
    back = _again(session, parent, release.id, "coordinator", f"release {release.id} was halted")
    if not handed_out and parent.artifact_version != release.artifact_version and newest_list(session) is not None:
        reason += f"; no way back was signed: `pocketfed release rollback {back.id}` does"
    log.warning("release %d on %s is halted, %d takes its place: %s", release.id, release.channel, back.id, reason)
    record(
        session, "coordinator", "release.halt", f"{release.id} {release.artifact_version}", "done",
        f"release {back.id} takes its place: {reason}",
    )  # fmt: skip
    return back


def _again(session: Session, last: Release, undoes_id: int | None, who: str, reason: str) -> Release:
    """An earlier release's content, for all."""
    back = Release(
        channel=last.channel,
        artifact_version=last.artifact_version,
        trainable_set=last.trainable_set,
        parameters=last.parameters,
        run_id=last.run_id,
        parent_id=last.id,
        undoes_id=undoes_id,
        min_sdk=last.min_sdk,
        max_sdk=last.max_sdk,
    )
    session.add(back)
    session.flush()
    _tell(session, back, who, reason)
    _supersede(session, back, who)
    return back


def promote(
    session: Session, release_id: int, who: str, percent: float | None = None, automatic: bool | None = None
) -> Release:
    """Give a staged or paused release to more devices; by default to all of them.

    Args:
        percent: at least what it has: what devices have got they keep. automatic: it goes on from there by itself, or not.

    Raises:
        ReleaseError: it is neither staged nor paused, fewer devices than it has, or nobody is to judge it on its way.
    """
    release = _locked(session, release_id)
    wanted = percent if percent is not None else release.percent if automatic else 100.0
    check_percent(wanted)
    if release.state not in ("staged", "paused"):
        raise ReleaseError(
            f"release {release.id} is {release.state}, so there is nothing to promote; `pocketfed release list` shows what is staged"
        )
    if wanted < release.percent:
        raise ReleaseError(
            f"release {release.id} has {release.percent:g} % of the devices, more than {wanted:g}; what they have they keep: "
            "pause it, or roll it back"
        )
    if automatic and not release.min_devices:
        raise ReleaseError(f"release {release.id} is judged by nobody (min_devices is 0), so it cannot go on by itself")
    if automatic is not None:
        release.automatic = automatic
    become(session, release, "live" if wanted == 100 else "staged", who, "promoted", wanted)
    return release


def pause(session: Session, release_id: int, who: str) -> Release:
    """Give it to nobody new; those that have it keep it.

    Raises:
        ReleaseError: it is not staged.
    """
    release = _locked(session, release_id)
    if release.state != "staged":
        raise ReleaseError(
            f"release {release.id} is {release.state}, so there is nothing to pause; to take it back: `pocketfed release rollback`"
        )
    become(session, release, "paused", who, "paused")
    return release


def _locked(session: Session, release_id: int) -> Release:
    lock_channel(session, find_release(session, release_id).channel)
    return session.get_one(Release, release_id, populate_existing=True)


def find_release(session: Session, release_id: int) -> Release:
    """
    Raises:
        ReleaseError: there is none of that number.
    """
    found = session.get(Release, release_id) if 0 < release_id < MAX_ID else None
    if found is None:
        raise ReleaseError(f"there is no release {release_id}; `pocketfed release list` shows them")
    return found


def roll_back(session: Session, keys: Keys | None, channel: str, what: str, who: str = "") -> Release:
    """Give a channel again what it had, and sign that it is meant.

    Args:
        keys: None where the fleet has no publisher. what: a release's number, or the beginning of a version: then what the
            channel had of that last.

    Raises:
        ReleaseError: no such release or version on the channel, or more than one. SigningError: no key to sign with.
    """
    lock_channel(session, channel)
    last = _released(session, channel, what)
    if keys is not None:
        sign_version(session, keys, channel, last.artifact_version, rollback=True, supersede=True)
    newest = open_releases(session, channel)
    for release in newest:
        if release.id > last.id and content(release) != content(last):
            become(session, release, "rolled_back", who, f"back to release {last.id}")
    return _again(session, last, newest[0].id if newest else None, who, f"back to release {last.id}")


def _released(session: Session, channel: str, what: str) -> Release:
    if what.isascii() and what.isdigit() and len(what) < 8:
        numbered = find_release(session, int(what))
        if numbered.channel != channel:
            raise ReleaseError(f"release {what} is on {numbered.channel!r}, not on {channel!r}; give --channel")
        return numbered
    if not (what.isalnum() and len(what) <= 64):
        raise ReleaseError(
            f"{what[:64]!r} is no release's number and not the beginning of a version; `pocketfed release list` shows them"
        )
    rows = sa.select(Release).where(Release.channel == channel, Release.artifact_version.startswith(what))
    found = {r.artifact_version: r for r in session.scalars(rows.order_by(Release.id))}  # the last one of each
    if len(found) != 1:
        raise ReleaseError(
            f"{len(found)} versions on {channel!r} begin with {what!r}; give enough of one that was released there "
            "(`pocketfed release list`)"
        )
    return next(iter(found.values()))


# ---- looking at them -------------------------------------------------------------------------------------------------


def newest_releases(session: Session, channel: str, most: int = 100) -> list[Release]:
    rows = sa.select(Release).where(Release.channel == channel)
    return list(session.scalars(rows.order_by(Release.id.desc()).limit(most)))


def shares(session: Session, channel: str) -> dict[int, int]:
    """Release -> how many of the channel's devices run it, as they say; 0: none yet."""
    its = sa.and_(ReleaseReport.release_id == Device.release_id, ReleaseReport.device_id == Device.id)
    runs = sa.case((ReleaseReport.went_back, ReleaseReport.before_id), else_=Device.release_id).label("runs")
    mine = sa.select(runs).select_from(Device).outerjoin(ReleaseReport, its)
    counted = mine.where(Device.channel == channel, Device.revoked_at.is_(None)).subquery()
    rows = session.execute(sa.select(counted.c.runs, sa.func.count()).group_by(counted.c.runs))
    return {row[0] or 0: row[1] for row in rows}


def events(session: Session, release_id: int) -> list[ReleaseEvent]:
    rows = sa.select(ReleaseEvent).where(ReleaseEvent.release_id == release_id)
    return list(session.scalars(rows.order_by(ReleaseEvent.id)))

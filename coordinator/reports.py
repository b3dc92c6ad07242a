"""What devices say of their releases: which they run, how it compares with the one before, and what follows from that."""

from __future__ import annotations

import logging
import math

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.operators import record
from pocketfed.coordinator.releases import MAX_ID, become, halt, lock_channel, open_releases
from pocketfed.coordinator.rollout import Comparison, bucket, compare, next_step, sdk_fits
from pocketfed.coordinator.store import Device, Release, ReleaseEvent, ReleaseReport, Store
from pocketfed.protos import fleet_pb2 as pb

log = logging.getLogger("pocketfed.coordinator")

MAX_EXAMPLES = 10**6
OFTEN = 100  # so many reports are looked at one by one; of n later ones, every n / OFTEN-th


def note_release(session: Session, device: Device, request: pb.CheckInRequest) -> None:
    """Keep which release a device runs, where it is one of its channel's."""
    known = int(request.release_id)
    refused = known != 0 and known == request.refused_release  # then it runs an older one, of which we know already
    runs = device.release_id if refused else (known or None)
    if runs != device.release_id:
        found = session.get(Release, runs) if runs and runs < MAX_ID else None
        device.release_id = None if found is None or found.channel != device.channel else runs


def hear(store: Store, device_id: int, request: pb.CheckInRequest) -> bool:
    """Take a device's report. True: a release has changed by it, so whoever waits is to be answered."""
    with store.write() as session:
        device = session.get_one(Device, device_id)
        if device.revoked_at is not None:  # it may have come by a credential that was right a moment ago
            return False
        note_release(session, device, request)
        taken = take_report(session, device, request.report, request.sdk_version)
        if isinstance(taken, str):
            log.info("the report of device %s is not used: %s", device.name, taken)
            return False
        return _judge(session, taken) if taken is not None else False


def take_report(session: Session, device: Device, said: pb.ReleaseReport, sdk: str) -> Release | str | None:
    """Keep a device's report, the first it makes of a release. The release; None if it had made one; why not, in words."""
    if not 0 < said.before_id < said.release_id < MAX_ID:
        return f"it compares release {said.release_id} with {said.before_id}"
    if not 0 < said.examples <= MAX_EXAMPLES or max(said.correct, said.correct_before) > said.examples:
        return f"of {said.examples} examples {said.correct} and {said.correct_before} cannot be right"
    losses = (said.loss_sum, said.loss_sum_before)
    if not all(math.isfinite(loss) and loss >= 0 for loss in losses):
        return f"the losses {losses} cannot be"
    lock_channel(session, device.channel)  # of two reports at once the second one sees what became of the first
    release = session.get(Release, said.release_id)
    before = session.get(Release, said.before_id)
    if release is None or before is None or {release.channel, before.channel} != {device.channel}:
        return f"releases {said.release_id} and {said.before_id} are not both on channel {device.channel!r}"
    fits = sdk_fits(sdk, release.min_sdk, release.max_sdk)
    if not fits or bucket(device.channel, device.name) >= release.percent:
        return f"release {release.id} was not for this device"
    if session.get(ReleaseReport, (release.id, device.id)) is not None:
        return None
    session.add(
        ReleaseReport(
            release_id=release.id,
            device_id=device.id,
            before_id=before.id,
            cohort=device.cohort,
            examples=said.examples,
            correct=said.correct,
            correct_before=said.correct_before,
            loss_sum=said.loss_sum,
            loss_sum_before=said.loss_sum_before,
            went_back=said.went_back,
        )
    )
    session.flush()
    return release


def comparisons(session: Session, release: Release) -> list[Comparison]:
    """How a release fares beside its parent, by cohort ("" for devices without one); of devices that ran the parent before."""
    groups = dict[str, list[ReleaseReport]]()
    for row in _reports(session, release):
        groups.setdefault(row.cohort or "", []).append(row)
    return [
        compare(cohort, rows, release.margin, release.loss_margin, release.min_devices)
        for cohort, rows in sorted(groups.items())
    ]


def _reports(session: Session, release: Release) -> list[ReleaseReport]:
    """Those that compare a release with its parent, or with another of the parent's very content."""
    parent = session.get(Release, release.parent_id) if release.parent_id else None
    if parent is None:
        return []
    same = sa.select(Release.id).where(
        Release.channel == parent.channel,
        Release.artifact_version == parent.artifact_version,
        Release.trainable_set == parent.trainable_set,
        Release.parameters == parent.parameters,
    )
    rows = sa.select(ReleaseReport).where(ReleaseReport.release_id == release.id, ReleaseReport.before_id.in_(same))
    return list(session.scalars(rows.order_by(ReleaseReport.device_id)))


def _judge(session: Session, release: Release) -> bool:
    """Halt a release that is worse for a cohort; let an automatic one go on that is not. True if it did."""
    sdks = (release.min_sdk, release.max_sdk)  # those for other versions are judged by themselves
    newest = [r for r in open_releases(session, release.channel) if (r.min_sdk, r.max_sdk) == sdks][:1]
    if not release.min_devices or newest != [release]:  # its successor is judged now
        return False
    made = sa.select(sa.func.count()).select_from(ReleaseReport).where(ReleaseReport.release_id == release.id)
    count = session.scalar(made) or 0
    if count > OFTEN and count % (count // OFTEN):
        return False
    compared = comparisons(session, release)
    worse = [c for c in compared if c.verdict == "worse"]
    if worse:
        halt(session, release, "; ".join(describe(c) for c in worse))
        return True
    verdicts = {c.verdict for c in compared}
    if release.automatic and release.state == "staged" and "fine" in verdicts and "unclear" not in verdicts:
        return _go_on(session, release, "; ".join(describe(c) for c in compared if c.verdict == "fine"))
    return False


def _go_on(session: Session, release: Release, why: str) -> bool:
    """To the next step, once `min_devices` have reported since the last. False: not yet."""
    told = sa.select(ReleaseEvent.at).where(ReleaseEvent.release_id == release.id).order_by(ReleaseEvent.id.desc())
    raised = session.scalars(told.limit(1)).one()
    if sum(row.at >= raised for row in _reports(session, release)) < release.min_devices:
        return False
    percent = next_step(release.percent)
    become(session, release, "live" if percent == 100 else "staged", "coordinator", why, percent)
    record(session, "coordinator", "release.promote", f"{release.id} {percent:g} %", "done", why)
    return True


def describe(c: Comparison) -> str:
    """
    >>> describe(Comparison("pilot", 5, 50, 0.5, 0.75, 1.5, 1.0, 1, "worse"))
    "cohort 'pilot': accuracy 0.5000 after 0.7500, loss 1.500 after 1.000, 5 devices, 50 examples"
    """
    whose = f"cohort {c.cohort!r}" if c.cohort else "devices without a cohort"
    return (
        f"{whose}: accuracy {c.accuracy:.4f} after {c.accuracy_before:.4f}, loss {c.loss:.3f} after "
        f"{c.loss_before:.3f}, {c.devices} devices, {c.examples} examples"
    )

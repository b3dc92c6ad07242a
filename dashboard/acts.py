"""The acts that the dashboard offers: for an operator's role, confirmed, and written down whether they come off or not."""

from __future__ import annotations

from pocketfed.coordinator.operators import Actor, OperatorError, acting
from pocketfed.coordinator.releases import pause, promote, roll_back
from pocketfed.coordinator.rollout import ReleaseError
from pocketfed.coordinator.signing import SigningError, keys_folder, newest_list, open_keys
from pocketfed.coordinator.store import Release, Store

__all__ = ["ACTS", "Actor", "act"]

ACTS = ("promote", "pause", "rollback")


def act(store: Store, actor: Actor, what: str, release_id: int, percent: float = 100.0) -> str:
    """Do it; a sentence that says what has become of it, or why nothing has.

    A rollback needs the publisher's keys beside the database where the fleet has a publisher: devices go back for nobody else.
    """
    target = f"{release_id} {percent:g} %" if what == "promote" else str(release_id)
    try:
        with acting(store, actor, what, target) as session:
            if what == "promote":
                release = promote(session, release_id, actor.name, percent)
            elif what == "pause":
                release = pause(session, release_id, actor.name)
            else:
                channel = session.get_one(Release, release_id).channel
                keys = open_keys(keys_folder(store)) if newest_list(session) is not None else None
                release = roll_back(session, keys, channel, str(release_id), actor.name)
            return f"Done: release {release.id} is {release.state} for {release.percent:g} % of {release.channel!r}."
    except (OperatorError, ReleaseError, SigningError) as error:
        return f"Refused: {error}."

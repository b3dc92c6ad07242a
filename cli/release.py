"""release list, show, promote, pause, rollback: what a channel's devices run, and how far a new release has come."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketfed.cli.database import opened
from pocketfed.cli.options import Database, Json, KeysFolder, group
from pocketfed.cli.output import format_moment, print_json, print_rows

if TYPE_CHECKING:
    from pocketfed.coordinator.store import Release

app = group("What a channel runs, and how far a new release has come.")
Number = Annotated[int, typer.Argument(help="The release's number, as `list` shows it.")]
Channel = Annotated[str, typer.Option()]


def _row(session: Any, release: Release, share: dict[int, int]) -> dict[str, Any]:
    from pocketfed.coordinator.signing import newest_signature

    signed = newest_signature(session, release.channel, release.artifact_version)
    return {
        "id": release.id,
        "version": release.artifact_version[:16],
        "trains": release.trainable_set,
        "run": release.run_id,
        "state": release.state,
        "percent": release.percent,
        "parent": release.parent_id,
        "devices": share.get(release.id, 0),
        "share": round(share.get(release.id, 0) / max(1, sum(share.values())), 4),
        "signed_by": signed.key if signed else None,
        "created_at": format_moment(release.created_at),
    }


@app.command("list")
def list_(
    database: Database,
    channel: Channel = "stable",
    most: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100,
    json: Json = False,
) -> None:
    """Show a channel's releases, the newest first: their states, and how many of its devices run each."""
    from pocketfed.coordinator.releases import newest_releases, shares

    with opened(database) as store, store.read() as session:
        share = shares(session, channel)
        rows = [_row(session, r, share) for r in newest_releases(session, channel, most)]
    shown = [
        {
            "id": row["id"],
            "state": _stage(row),
            "devices": f"{row['devices']} of {sum(share.values())}",
            "version": row["version"][:12],
            "trains": row["trains"],
            "created_at": row["created_at"],
        }
        for row in rows
    ]
    print_rows(f"releases on {channel}", rows if json else shown, json)


@app.command("show")
def show(number: Number, database: Database, json: Json = False) -> None:
    """Show one release: how it goes out, how it fares in each cohort beside its parent, and what it came to be."""
    from pocketfed.coordinator.releases import events, find_release, shares
    from pocketfed.coordinator.reports import comparisons

    with opened(database) as store, store.read() as session:
        release = find_release(session, number)
        facts = _row(session, release, shares(session, release.channel)) | {
            "version": release.artifact_version,
            "channel": release.channel,
            "undoes": release.undoes_id,
            "margin": release.margin,
            "loss_margin": release.loss_margin,
            "min_devices": release.min_devices,
            "automatic": release.automatic,
            "min_sdk": release.min_sdk,
            "max_sdk": release.max_sdk,
        }
        cohorts = [dataclasses.asdict(c) for c in comparisons(session, release)]
        history = [
            {"at": format_moment(e.at), "state": e.state, "percent": e.percent, "who": e.who, "reason": e.reason}
            for e in events(session, number)
        ]
    if json:
        print_json(facts | {"cohorts": cohorts, "history": history})
        return
    print_rows(f"release {number}", [{"what": name, "is": value} for name, value in facts.items()], False)
    beside = [
        {
            "cohort": c["cohort"] or "(none)",
            "devices": c["devices"],
            "went back": c["went_back"],
            "accuracy": f"{c['accuracy']:.4f} after {c['accuracy_before']:.4f}",
            "loss": f"{c['loss']:.3f} after {c['loss_before']:.3f}",
            "verdict": c["verdict"],
        }
        for c in cohorts
    ]
    print_rows("beside its parent, on the devices' own examples", beside, False)
    told = [{"at": e["at"], "state": _stage(e), "who": e["who"], "reason": e["reason"]} for e in history]
    print_rows("history", told, False)


def _stage(row: dict[str, Any]) -> str:
    return f"{row['state']} {row['percent']:g} %" if row["state"] in ("staged", "paused") else str(row["state"])


@app.command("promote")
def promote(
    number: Number,
    database: Database,
    percent: Annotated[
        float | None, typer.Option(help="Of the channel's devices, at least what it has; by default all of them.")
    ] = None,
    auto: Annotated[
        bool | None, typer.Option("--auto/--no-auto", help="It goes on by itself while no cohort is worse, or not.")
    ] = None,
) -> None:
    """Give a staged release to more devices, or go on with a paused one."""
    from pocketfed.coordinator import releases
    from pocketfed.coordinator.operators import acting, local_admin

    target = f"{number}{'' if percent is None else f' {percent:g} %'}{' auto' if auto else ''}"
    with opened(database) as store, acting(store, local_admin(), "promote", target) as session:
        release = releases.promote(session, number, local_admin().name, percent, auto)
        by_itself = ", and goes on by itself" if release.automatic and release.state == "staged" else ""
        print(f"release {number} is {release.state} for {release.percent:g} % of {release.channel!r}{by_itself}")


@app.command("pause")
def pause(number: Number, database: Database) -> None:
    """Give a staged release to no more devices; those that have it keep it. `promote` goes on."""
    from pocketfed.coordinator import releases
    from pocketfed.coordinator.operators import acting, local_admin

    with opened(database) as store, acting(store, local_admin(), "pause", str(number)) as session:
        release = releases.pause(session, number, local_admin().name)
        print(f"release {number} is paused at {release.percent:g} % of {release.channel!r}")


@app.command("rollback")
def rollback(
    what: Annotated[str, typer.Argument(help="What to go back to: a release's number, or a version's beginning.")],
    database: Database,
    channel: Channel = "stable",
    folder: KeysFolder = None,
) -> None:
    """Release again what a channel had; signed, since devices go back for nobody else."""
    from pocketfed.coordinator.operators import acting, local_admin
    from pocketfed.coordinator.releases import roll_back
    from pocketfed.coordinator.signing import keys_folder, open_keys

    with opened(database) as store, acting(store, local_admin(), "rollback", f"{channel} {what}") as session:
        back = roll_back(session, open_keys(folder or keys_folder(store)), channel, what, local_admin().name)
        print(f"released {back.artifact_version[:12]} on {channel!r} again, as release {back.id}")

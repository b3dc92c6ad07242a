"""Models: what was published, what came of it, who runs what, and the acts that change that."""

from __future__ import annotations

import sqlalchemy as sa
import streamlit as st

from pocketfed.coordinator.store import Store
from pocketfed.dashboard import acts, charts, frame, login, opening, queries, words

SHOWN = 20  # artifacts and releases in a table
DRAWN = 6  # models in the size chart


def show(opened: Store) -> None:
    frame.heading("Models", "What was published, how large it is, and what came of it. Times are UTC.")
    with opened.read() as session:
        artifacts = queries.models.artifacts(session, SHOWN)
        releases = queries.models.releases(session, SHOWN)
    if not artifacts:
        raise opening.NothingToShowError(
            "No model yet",
            "a model appears here once it is published: `pocketfed publish DIR --channel NAME`, or by a simulation",
        )
    _newest(artifacts[0])
    st.subheader("What came of what")
    st.altair_chart(charts.lineage(charts.nodes(artifacts[:DRAWN][::-1], releases[:DRAWN][::-1])), width="stretch")
    if any(a.sizes for a in artifacts[:DRAWN]):
        st.subheader("Size by precision")
        st.altair_chart(charts.sizes([a for a in artifacts[:DRAWN] if a.sizes]), width="stretch")
    st.subheader("Published models")
    with opened.read() as session:
        signed = queries.models.signatures(session, [a.version for a in artifacts])
    _artifacts(artifacts, signed)
    _download(opened, artifacts)
    st.subheader("Releases")
    st.caption(
        "What each channel was given; devices take the one marked as current, or a staged one whose share they are in."
    )
    if not releases:
        st.info("Nothing was released yet.")
        return
    _releases(opened, releases)
    _judged(opened, releases)
    _events(opened)
    _acts(releases)


def _newest(a: queries.models.ArtifactLine) -> None:
    full, small = a.sizes.get("fp32"), a.sizes.get("int8")
    saving = f"{full / small:.1f} × smaller than fp32" if full and small else ""
    frame.cards(
        ("Newest model", words.plain(a.preset, 20) or "no preset", f"version {words.plain(a.version[:8])}"),
        ("Parameters", words.short(a.parameters), f"{a.parameters:,}" if a.parameters else ""),
        ("FLOPs a text", words.short(a.flops), "at 128 tokens"),
        ("Size as int8", words.size(small), saving),
        ("To download", words.size(a.bytes), "all files, once"),
        ("Labels", f"{a.labels:,}" if a.labels else "–", ""),
    )


def _artifacts(artifacts: list[queries.models.ArtifactLine], signed: dict[str, str]) -> None:
    rows = [
        {
            "Version": words.plain(a.version[:12]),
            "Preset": words.plain(a.preset, 30),
            "Made from": words.plain((a.parent or "")[:12]),
            "Precision": words.plain(a.quantization, 12) or "not quantized",
            "Parameters": a.parameters,
            "fp32": _megabytes(a, "fp32"),
            "fp16": _megabytes(a, "fp16"),
            "int8": _megabytes(a, "int8"),
            "Accuracy": a.metrics.get("accuracy"),
            "Latency": a.metrics.get("latency_ms"),
            "Signed by": words.plain(signed.get(a.version), 16) or "not signed",
            "Labels": a.labels or None,
            "Published (UTC)": words.utc(a.created_at),
            "Devices may train": words.plain(
                ", ".join(f"{name} ({words.short(n)})" for name, n in a.trainable_sets.items()), 120
            ),
        }
        for a in artifacts
    ]
    megabytes = {
        name: st.column_config.NumberColumn(f"{name} (MB)", format="%.2f") for name in ("fp32", "fp16", "int8")
    }
    columns = {
        "Parameters": st.column_config.NumberColumn(format="localized"),
        "Latency": st.column_config.NumberColumn("Latency (ms)", format="%.1f", help="as its manifest says"),
    }
    told = "as its manifest says; a run's own result stands at its release"
    frame.table(rows, columns | megabytes, shares={"Accuracy": ("Accuracy", told)})


def _megabytes(a: queries.models.ArtifactLine, precision: str) -> float | None:
    return a.sizes[precision] / 1e6 if precision in a.sizes else None


def _download(opened: Store, artifacts: list[queries.models.ArtifactLine]) -> None:
    having = {a.version: a for a in artifacts if a.files}
    if not having:
        st.caption("No published model holds files to download.")
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        version = st.selectbox("Model", list(having), format_func=lambda v: charts.artifact_label(having[v]), width=260)
        name = st.selectbox("File", sorted(having[version].files), format_func=lambda n: words.plain(n, 60), width=260)
        if st.button("Prepare the download", icon=":material/download:"):
            with opened.read() as session:
                data = queries.models.file_bytes(session, having[version].files[name])
            if data is None:
                st.error("The database does not hold that file any more.")
            else:
                st.download_button(
                    "Save", data, words.plain(name.replace("/", "-"), 80), on_click="ignore", type="primary"
                )


def _releases(opened: Store, releases: list[queries.models.ReleaseLine]) -> None:
    with opened.read() as session:
        run_by = {channel: queries.models.running(session, channel) for channel in {r.channel for r in releases}}
    rows = [
        {
            "Release": r.id,
            "Channel": words.plain(r.channel, 40),
            "Current": r.current,
            "State": f"{r.state} {r.percent:g} %" if r.state in ("staged", "paused") else r.state,
            "Devices": run_by[r.channel].get(r.id, 0),
            "Share": run_by[r.channel].get(r.id, 0) / max(sum(run_by[r.channel].values()), 1),
            "Model": words.plain(r.artifact_version[:12]),
            "Trained part": words.plain(r.trainable_set, 30),
            "Accuracy": r.accuracy,
            "kB": r.bytes / 1e3,
            "For SDK": r.sdks or "any",
            "Takes back": r.undoes_id,
            "Came from": charts.run_label(r.run_id, r.run or "") if r.run_id is not None else "published as it was",
            "Released (UTC)": words.utc(r.created_at),
        }
        for r in releases
    ]
    columns = {
        "kB": st.column_config.NumberColumn("Trained values (kB)", format="%.1f"),
        "Devices": st.column_config.NumberColumn("Devices that run it", help="as they say"),
    }
    shares = {"Share": ("Share of the fleet", None), "Accuracy": ("Accuracy", "of the run it came from")}
    frame.table(rows, columns, shares=shares)


def _judged(opened: Store, releases: list[queries.models.ReleaseLine]) -> None:
    trials = [r.id for r in releases if r.parent_id is not None]
    if not trials:
        return
    st.subheader("Beside what it follows, cohort by cohort")
    chosen = st.selectbox("Release", trials, key="judged", width=160)
    with opened.read() as session:
        compared = queries.models.judged(session, chosen)
    if not compared:
        st.info(
            f"No cohort has {queries.learning.MIN_COHORT} devices that have measured release {chosen} beside the one before."
        )
        return
    rows = [
        {
            "Cohort": words.plain(c.cohort, 40) or "no cohort", "Verdict": c.verdict, "Devices": c.devices,
            "Examples": c.examples, "Accuracy": c.accuracy, "Before": c.accuracy_before, "Loss": c.loss,
            "Loss before": c.loss_before, "Went back": c.went_back,
        }
        for c in compared
    ]  # fmt: skip
    columns = {
        "Loss": st.column_config.NumberColumn("Loss (nats)", format="%.3f"),
        "Loss before": st.column_config.NumberColumn("Loss before (nats)", format="%.3f"),
    }
    frame.table(rows, columns, shares={"Accuracy": ("Accuracy", None), "Before": ("Accuracy before", None)})


def _events(opened: Store) -> None:
    with opened.read() as session:
        events = queries.models.release_events(session)
    if events:
        with st.expander("What became of releases, the newest first"):
            rows = [
                {
                    "Time (UTC)": words.utc(e.at), "Release": e.release_id, "Became": e.state, "Percent": e.percent,
                    "By": words.plain(e.who, 60), "Reason": words.plain(e.reason, 200),
                }
                for e in events
            ]  # fmt: skip
            frame.table(rows, {"Reason": st.column_config.TextColumn(width="large")})


def _acts(releases: list[queries.models.ReleaseLine]) -> None:
    st.subheader("Promote, pause, roll back")
    who = login.actor()
    if who is None:
        st.info("For operators only: make one with `pocketfed operator set`, then log in here.")
        return
    with st.form("act", clear_on_submit=True):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            what = st.selectbox("What", acts.ACTS, width=160)
            number = st.selectbox("Which release", [r.id for r in releases], width=130, key="release to act on")
            percent = st.number_input("Percent of the devices", 0.01, 100.0, 100.0, width=200, help="to promote to")
            typed = st.text_input("Its number again, to confirm", max_chars=12, width=220)
        sent = st.form_submit_button("Do it", type="primary")
    st.caption(
        "promote: to more devices; pause: to nobody new; rollback: the channel gets that release's content again. Each "
        "try is written into the audit."
    )
    if sent and typed.strip() != str(number):
        st.warning(f"Nothing was done: to {what} release {number}, type {number} to confirm.")
    elif sent:
        _do(who, what, number, percent)


def _do(who: acts.Actor, what: str, number: int, percent: float) -> None:
    try:
        with opening.writing() as opened:
            said = acts.act(opened, who, what, number, percent)
    except sa.exc.DBAPIError as error:
        st.error(f"Nothing was done: this account cannot write to the database ({words.plain(str(error.orig), 120)}).")
        return
    if said.startswith("Done"):
        st.success(said)
    else:
        st.error(words.plain(said, 300))


if __name__ == "__main__":
    frame.page(show)

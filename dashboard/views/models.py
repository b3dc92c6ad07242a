"""Models: what was published, how large it is, and where it came from."""

from __future__ import annotations

import streamlit as st

from pocketfed.coordinator.store import Store
from pocketfed.dashboard import charts, frame, queries, words

SHOWN = 20  # artifacts and releases in a table
DRAWN = 6  # models in the size chart


def show(opened: Store) -> None:
    frame.heading("Models", "What was published, how large it is, and what came of it. Times are UTC.")
    with opened.read() as session:
        artifacts = queries.models.artifacts(session, SHOWN)
        releases = queries.models.releases(session, SHOWN)
    if not artifacts:
        raise frame.NothingToShowError(
            "No model yet",
            "a model appears here once it is published: `pocketfed publish DIR --channel NAME`, or by a simulation",
        )
    _newest(artifacts[0])
    if any(a.sizes for a in artifacts[:DRAWN]):
        st.subheader("Size by precision")
        st.altair_chart(charts.sizes([a for a in artifacts[:DRAWN] if a.sizes]), width="stretch")
    st.subheader("Published models")
    _artifacts(artifacts)
    st.subheader("Releases")
    st.caption("What each channel was given; devices take the one marked as current.")
    _releases(releases)


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


def _artifacts(artifacts: list[queries.models.ArtifactLine]) -> None:
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
    frame.table(rows, {"Parameters": st.column_config.NumberColumn(format="localized"), **megabytes})


def _megabytes(a: queries.models.ArtifactLine, precision: str) -> float | None:
    return a.sizes[precision] / 1e6 if precision in a.sizes else None


def _releases(releases: list[queries.models.ReleaseLine]) -> None:
    if not releases:
        st.info("Nothing was released yet.")
        return
    rows = [
        {
            "Channel": words.plain(r.channel, 40),
            "Current": r.current,
            "Model": words.plain(r.artifact_version[:12]),
            "Trained part": words.plain(r.trainable_set, 30),
            "kB": r.bytes / 1e3,
            "Came from": charts.run_label(r.run_id, r.run or "") if r.run_id is not None else "published as it was",
            "Released (UTC)": words.utc(r.created_at),
        }
        for r in releases
    ]
    frame.table(rows, {"kB": st.column_config.NumberColumn("Trained values (kB)", format="%.1f")})


if __name__ == "__main__":
    frame.page(show)

"""What every page shares: who may see it, the chosen run, and a friendly word when there is nothing to show."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import sqlalchemy as sa
import streamlit as st

from pocketfed.coordinator.store import Store, StoreError
from pocketfed.dashboard import login, queries
from pocketfed.dashboard.charts import BLUE, GREY, ORANGE, RED, TEAL, learning, run_label
from pocketfed.dashboard.opening import NothingToShowError, store
from pocketfed.dashboard.words import markup

RETRY_S = 4  # how often a page with nothing to show looks again
LIVE_S = 2  # how often a page that shows something under way looks again
PAGE_ROWS = 50
TONES = {"good": TEAL, "busy": BLUE, "wait": ORANGE, "bad": RED, "quiet": GREY}


# ---- a page ------------------------------------------------------------------------------------------------


def page(body: Callable[[Store], None]) -> None:
    """Draw a page from the store, or say in a sentence why it cannot be; then look again every RETRY_S seconds."""
    try:
        opened = store()
        if login.admit(opened):
            body(opened)
    except (NothingToShowError, StoreError, sa.exc.DBAPIError) as error:
        trouble = _as_trouble(error)
        st.session_state["fresh"] = True
        _retrying(trouble.title, trouble.sentence)


def live(body: Callable[[Store], None]) -> Callable[[], None]:
    """`body` as a part of the page that redraws itself every LIVE_S seconds and leaves the rest alone."""

    @st.fragment(run_every=LIVE_S)
    def part() -> None:
        try:
            opened = store()
            if not login.entitled(opened):  # logged out elsewhere, disabled, or of another role by now
                st.rerun()
            body(opened)
        except (NothingToShowError, StoreError, sa.exc.DBAPIError) as error:
            trouble = _as_trouble(error)
            notice("wait", trouble.title, html.escape(trouble.sentence))

    return part


def _as_trouble(error: Exception) -> NothingToShowError:
    if isinstance(error, NothingToShowError):
        return error
    if isinstance(error, sa.exc.DBAPIError):
        return NothingToShowError(
            "The database does not answer",
            f"{error.orig}; it may be in use by another process, or be of another version of pocketfed",
        )
    return NothingToShowError("The database cannot be shown", str(error))


@st.fragment(run_every=RETRY_S)
def _retrying(title: str, sentence: str) -> None:
    if not st.session_state.pop("fresh", False):
        st.rerun()  # the whole page: the database may be there by now
    shown = sentence[:1].upper() + sentence[1:].rstrip(".")
    notice("wait", title, f"{html.escape(shown)}.<br><small>This page looks again every {RETRY_S} seconds.</small>")


def notice(tone: str, title: str, body_html: str) -> None:
    """A banner. `title` is text; `body_html` is ours, with every foreign part through `markup` or `html.escape`."""
    colour = TONES[tone]
    st.html(
        f'<div role="status" style="border-left:6px solid {colour};background:{colour}1f;'
        f'border-radius:8px;padding:14px 18px;overflow-wrap:anywhere">'
        f'<div style="font-size:1.3rem;font-weight:600;line-height:1.35">{html.escape(title)}</div>'
        f'<div style="margin-top:4px;line-height:1.5">{body_html}</div></div>'
    )


def cards(*entries: tuple[str, str, str]) -> None:
    """Numbers worth a glance: (label, value, note) each, side by side as far as the screen is wide."""
    style = "border:1px solid #8884;border-radius:8px;padding:10px 14px;min-width:0;overflow-wrap:anywhere"
    drawn = "".join(
        f'<div style="{style}"><div style="font-size:.85rem;opacity:.75">{html.escape(label)}</div>'
        f'<div style="font-size:1.65rem;font-weight:600;line-height:1.3">{html.escape(value)}</div>'
        f'<div style="font-size:.85rem;opacity:.75;min-height:1.2em">{html.escape(note)}</div></div>'
        for label, value, note in entries
    )
    most = len(entries) if len(entries) <= 6 else -(-len(entries) // 2)  # in a row, so that none stands alone
    widest = f"calc((100% - {12 * (most - 1)}px) / {most})"
    columns = f"repeat(auto-fit,minmax(max(min(150px,100%),{widest}),1fr))"
    st.html(f'<div style="display:grid;grid-template-columns:{columns};gap:12px">{drawn}</div>')


def heading(title: str, under: str) -> None:
    """The page's name and one line of what it shows; both are ours, never a stranger's text."""
    st.title(title)
    st.caption(under)


# ---- choosing ----------------------------------------------------------------------------------------------


def chosen_run(opened: Store) -> int:
    """The run this page is about: the one in the address (`?run=3`) or in the sidebar, else the newest.

    Raises:
        NothingToShowError: there is no run, or none of that number.
    """
    with opened.read() as session:
        names = queries.runs.run_names(session)
        newest = queries.runs.newest_run_id(session)
        if newest is None:
            raise NothingToShowError(
                "No run yet",
                "the database holds no run; start one with `pocketfed simulate` or `pocketfed serve --run run.toml`",
            )
        wanted = _wanted_run()
        if wanted is not None and wanted not in names:
            asked = queries.runs.run(session, wanted)
            if asked is None:
                _forget_run()
                raise NothingToShowError(
                    f"There is no run {wanted}",
                    "this database holds no run of that number; the newest is shown in a moment",
                )
            names = {wanted: asked.name, **names}
    options = [None, *names]
    choice = st.sidebar.selectbox(
        "Run",
        options,
        index=options.index(wanted),
        format_func=lambda i: "the newest" if i is None else run_label(i, names[i]),
    )
    st.session_state["run"] = choice
    if choice is None:
        st.query_params.pop("run", None)
    else:
        st.query_params["run"] = str(choice)
    return newest if choice is None else choice


def _wanted_run() -> int | None:
    """The address counts on arrival, the sidebar's choice (kept from page to page) afterwards."""
    if "run" in st.session_state:
        kept = st.session_state["run"]
        return kept if isinstance(kept, int) else None
    text = st.query_params.get("run", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _forget_run() -> None:
    st.session_state["run"] = None
    st.query_params.pop("run", None)


def offset(total: int, key: str, noun: str) -> int:
    """A chooser of pages of PAGE_ROWS rows where there are more than fit on one. Returns the first row to show."""
    pages = max(-(-total // PAGE_ROWS), 1)
    if pages == 1:
        return 0
    number = st.number_input(f"Page of {pages:,} ({total:,} {noun})", 1, pages, 1, key=key, width=260)
    return (int(number) - 1) * PAGE_ROWS


def table(
    rows: Sequence[Mapping[str, object]],
    columns: Mapping[str, Any],
    most: int = 12,
    shares: Mapping[str, tuple[str, str | None]] | None = None,
) -> None:
    """A table of as many lines as it has, `most` of them in sight; `columns` says how some are shown.

    shares: columns from 0 to 1 that are shown in percent, with two decimals in every line: their title and help.
    """
    height = 38 + 35 * min(max(len(rows), 1), most)
    frame = pd.DataFrame(list(rows))
    for name, (title, told) in (shares or {}).items():
        frame[name] = 100 * frame[name].astype(float)
        columns = {**columns, name: st.column_config.NumberColumn(f"{title} (%)", format="%.2f", help=told)}
    st.dataframe(frame, hide_index=True, width="stretch", column_config=columns, height=height, placeholder="–")


def run_sentence(line: queries.runs.RunLine) -> str:
    """HTML: what a run trains, on which channel."""
    return (
        f"Run {line.id} <b>{markup(line.name, 60)}</b> trains <b>{markup(line.trainable_set, 30)}</b> "
        f"of model <code>{markup(line.artifact_version[:8])}</code> for channel <b>{markup(line.channel, 30)}</b>."
    )


def side_by_side(curves: pd.DataFrame, axis: str, when: str = "") -> None:
    """Accuracy and loss of `charts.learning_frame`. when: said after what is not known yet."""
    for measure, column in zip(("accuracy", "loss"), st.columns(2, gap="large"), strict=True):
        with column:
            st.subheader(measure.capitalize())
            if (curves["measure"] == measure).any():
                st.altair_chart(learning(curves, measure, axis), width="stretch")
            else:
                st.info(f"No {measure} is known yet{when}.")

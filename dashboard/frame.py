"""What every page shares: the open database, the chosen run, and a friendly word when there is nothing to show."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
import streamlit as st

from pocketfed.coordinator.store import Store, StoreError, database_url
from pocketfed.dashboard import queries
from pocketfed.dashboard.charts import BLUE, GREY, ORANGE, RED, TEAL, run_label
from pocketfed.dashboard.launch import DATABASE_VARIABLE
from pocketfed.dashboard.words import markup

if TYPE_CHECKING:
    import pandas as pd

RETRY_S = 4  # how often a page with nothing to show looks again
LIVE_S = 2  # how often a page that shows something under way looks again
PAGE_ROWS = 50
TONES = {"good": TEAL, "busy": BLUE, "wait": ORANGE, "bad": RED, "quiet": GREY}


@dataclass(frozen=True)
class Trouble(Exception):
    """Nothing to show, for a reason that is no fault of the reader."""

    title: str
    sentence: str


# ---- the database ------------------------------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False, max_entries=4)
def _open(database: str, identity: int | None) -> Store:
    """One engine for all readers. `identity` changes with the file, so that a database made anew is opened anew."""
    del identity
    return Store(database, create=False)


def _file_identity(database: str) -> int | None:
    url = database_url(database)
    if url.get_backend_name() != "sqlite" or url.database is None:
        return 0
    try:
        return os.stat(url.database).st_ino
    except OSError:
        return None


def store() -> Store:
    """The store named by the environment.

    Raises:
        Trouble: no database is named, or it cannot be used.
    """
    database = os.environ.get(DATABASE_VARIABLE, "")
    if not database:
        raise Trouble("No database is named", f"set {DATABASE_VARIABLE}, or start `pocketfed dashboard --database fleet.db`")
    try:
        return _open(database, _file_identity(database))
    except StoreError as error:
        raise Trouble("The database cannot be shown", str(error)) from None


# ---- a page ------------------------------------------------------------------------------------------------------------


def page(body: Callable[[Store], None]) -> None:
    """Draw a page from the store, or say in a sentence why it cannot be; then look again every RETRY_S seconds."""
    try:
        body(store())
    except (Trouble, StoreError, sa.exc.DBAPIError) as error:
        trouble = _as_trouble(error)
        st.session_state["fresh"] = True
        _retrying(trouble.title, trouble.sentence)


def live(body: Callable[[Store], None]) -> Callable[[], None]:
    """`body` as a part of the page that redraws itself every LIVE_S seconds and leaves the rest, and what was chosen, alone."""

    @st.fragment(run_every=LIVE_S)
    def part() -> None:
        try:
            body(store())
        except (Trouble, StoreError, sa.exc.DBAPIError) as error:
            trouble = _as_trouble(error)
            notice("wait", trouble.title, html.escape(trouble.sentence))

    return part


def _as_trouble(error: Exception) -> Trouble:
    if isinstance(error, Trouble):
        return error
    if isinstance(error, sa.exc.DBAPIError):
        return Trouble("The database does not answer", f"{error.orig}; it may be in use by another process, or be of another version of pocketfed")
    return Trouble("The database cannot be shown", str(error))


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
        f'<div role="status" style="border-left:6px solid {colour};background:{colour}1f;border-radius:8px;padding:14px 18px;overflow-wrap:anywhere">'
        f'<div style="font-size:1.3rem;font-weight:600;line-height:1.35">{html.escape(title)}</div>'
        f'<div style="margin-top:4px;line-height:1.5">{body_html}</div></div>'
    )


def heading(title: str, under: str) -> None:
    """The page's name and one line of what it shows; both are ours, never a stranger's text."""
    st.title(title)
    st.caption(under)


# ---- choosing ----------------------------------------------------------------------------------------------------------


def chosen_run(opened: Store) -> int:
    """The run this page is about: the one in the address (`?run=3`) or in the sidebar, else the newest.

    Raises:
        Trouble: there is no run, or none of that number.
    """
    with opened.read() as session:
        names = queries.run_names(session)
        newest = queries.newest_run_id(session)
        if newest is None:
            raise Trouble(
                "No run yet", "the database is there and holds no run; start one with `pocketfed simulate` or `pocketfed serve --run run.toml` on it"
            )
        wanted = _wanted_run()
        if wanted is not None and wanted not in names:
            asked = queries.run(session, wanted)
            if asked is None:
                _forget_run()
                raise Trouble(f"There is no run {wanted}", "this database holds no run of that number; the newest is shown in a moment")
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


def table(frame: pd.DataFrame, *, height: int | None = None, **columns: object) -> None:
    """A table without an index; `columns` are `st.column_config` entries."""
    # Streamlit shows a missing text as "None"; an empty cell says the same in the reader's language
    rows = min(len(frame), 12)
    st.dataframe(frame, hide_index=True, width="stretch", column_config=dict(columns), height=height or 38 + 35 * max(rows, 1), placeholder="–")  # type: ignore[arg-type]


def run_sentence(line: queries.RunLine) -> str:
    """HTML: what a run trains, on which channel."""
    return (
        f"Run {line.id} <b>{markup(line.name, 60)}</b> trains <b>{markup(line.trainable_set, 30)}</b> "
        f"of model <code>{markup(line.artifact_version, 8)}</code> for channel <b>{markup(line.channel, 30)}</b>."
    )

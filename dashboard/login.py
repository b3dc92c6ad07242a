"""Who is looking: operators by password, or by the organisation's own log-in (OIDC) where that is configured.

A database without operators is open to look at for who is on this machine, and to nobody else: then there is nothing to
log in with, and whoever is here could read the file anyway.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
import streamlit as st

from pocketfed.coordinator.operators import Actor, log_in, recognise, record
from pocketfed.coordinator.store import Operator, Store
from pocketfed.dashboard import opening
from pocketfed.dashboard.launch import DATABASE_VARIABLE, OPEN_VARIABLE
from pocketfed.dashboard.words import plain

SESSION_S = 12 * 3600.0
WITHIN_S = 15 * 60.0
TRIES, TRIES_OF_ALL = 5, 100  # failed log-ins within WITHIN_S: as one name, and as any


class Tries:
    """Failed log-ins of the last minutes, counted in this process: a flood of them costs the database nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failed: deque[tuple[float, str]] = deque(maxlen=TRIES_OF_ALL)

    def begin(self, name: str) -> float:
        """Seconds until that name may be tried; 0: now, and the try counts as failed until `succeeded` is told of it.

        So tries at the same time, from many windows, are no more than those one after the other.
        """
        with self._lock:
            at = self._clock()
            since = at - WITHIN_S
            recent = [(at, who) for at, who in self._failed if at > since]
            as_this = [at for at, who in recent if who == name[:100]]
            first = as_this[-TRIES:] if len(as_this) >= TRIES else [at for at, _ in recent][-TRIES_OF_ALL:]
            if len(as_this) >= TRIES or len(recent) >= TRIES_OF_ALL:
                return max(0.0, first[0] - since)
            self._failed.append((at, name[:100]))
            return 0.0

    def succeeded(self, name: str) -> None:
        """Forget that name's newest try."""
        with self._lock:
            mine = [i for i, (_, who) in enumerate(self._failed) if who == name[:100]]
            if mine:
                del self._failed[mine[-1]]


@st.cache_resource(show_spinner=False)
def _tries(database: str) -> Tries:
    del database
    return Tries()


# ---- who is there ----------------------------------------------------------------------------------------------------


def actor() -> Actor | None:
    """Who looks at this page, as `admit` found; None: nobody that has a name here."""
    found = st.session_state.get("actor")
    return found if isinstance(found, Actor) else None


def admit(opened: Store) -> bool:
    """Whether the page may be drawn; else the log-in is drawn in its place.

    Raises:
        NothingToShowError: nobody can log in, and this machine is not the reader's.
    """
    if not entitled(opened):
        _forget()
        _form()
        return False
    if (who := actor()) is not None:
        _signed_in(who)
    return True


def entitled(opened: Store) -> bool:
    """Whether whoever looks may still look; asks the store each time, so that who is disabled is out at once.

    Raises:
        NothingToShowError: as `admit`.
    """
    st.session_state["actor"] = None
    with opened.read() as session:
        every = session.execute(sa.select(Operator.name, Operator.role, Operator.disabled_at, Operator.password)).all()
    operators = {row.name: row.role for row in every if row.disabled_at is None}
    if not every and not oidc_configured():
        if os.environ.get(OPEN_VARIABLE) == "1":
            return True
        raise opening.NothingToShowError(
            "Nobody can log in yet",
            "the dashboard listens beyond this machine and the database has no operator; make one with "
            "`pocketfed operator set NAME --role viewer --password-file FILE --database DATABASE`",
        )
    name = _by_password({row.name: row.password for row in every})
    if name is None and oidc_configured() and _known_outside():
        name = _by_organisation(operators)
    if name is None or name not in operators:
        return False
    found = Actor(name, operators[name])
    st.session_state["actor"] = found
    return True


def _by_password(passwords: Mapping[str, str]) -> str | None:
    """Who has logged in here, for as long as that lasts and the password that was given is still theirs."""
    name, hashed, until = st.session_state.get("signed in", ("", "", 0.0))
    return name if time.monotonic() < until and passwords.get(name) == hashed else None


def _forget() -> None:
    st.session_state.pop("signed in", None)


def _signed_in(who: Actor) -> None:
    with st.sidebar:
        st.caption("Logged in as")
        st.text(f"{plain(who.name)}, {who.role}")
        if st.button("Log out", icon=":material/logout:", key="log out"):
            _forget()
            if oidc_configured() and _known_outside():
                st.logout()
            st.rerun()


# ---- by password -----------------------------------------------------------------------------------------------------


def _form() -> None:
    st.title("Log in")
    if oidc_configured():
        st.button("Log in with your organisation", icon=":material/badge:", on_click=st.login, key="organisation")
        st.caption("Or as an operator of this fleet:")
    with st.form("log in", width=420):
        name = st.text_input("Name", max_chars=100, autocomplete="username")
        password = st.text_input("Password", type="password", max_chars=1000, autocomplete="current-password")
        sent = st.form_submit_button("Log in", type="primary")
    if sent:
        why = _try(name, password)
        if why:
            st.error(why)
        else:
            with opening.store().read() as session:
                hashed = session.get_one(Operator, name).password
            st.session_state["signed in"] = (name, hashed, time.monotonic() + SESSION_S)
            st.rerun()


def _try(name: str, password: str) -> str:
    """Empty if that is right, else why not."""
    tries = _tries(os.environ.get(DATABASE_VARIABLE, ""))
    wait = tries.begin(name)
    if wait:
        return f"There were too many failed log-ins; try again in {int(wait // 60) + 1} minutes."
    if check(name, password) is None:
        return "That name and password do not go together."
    tries.succeeded(name)
    return ""


def check(name: str, password: str) -> Actor | None:
    """Audited where the database can be written; where this account may only read, checked all the same."""
    try:
        with opening.writing() as opened:
            return log_in(opened, name, password)
    except sa.exc.DBAPIError:
        with opening.store().read() as session:
            return recognise(session, name, password)


# ---- by the organisation ---------------------------------------------------------------------------------------------


def oidc_configured() -> bool:
    """Whether Streamlit's secrets have a section [auth] (docs/operations.md)."""
    return st.secrets.load_if_toml_exists() and "auth" in st.secrets


def _known_outside() -> bool:
    return bool(st.user.get("is_logged_in", False))


def operator_of(claims: Mapping[str, Any], operators: Mapping[str, str]) -> str | None:
    """The operator that an identity is: named as its e-mail address, which the provider has to vouch for.

    >>> operator_of({"email": "a@b.org", "email_verified": True}, {"a@b.org": "viewer"})
    'a@b.org'
    >>> operator_of({"email": "a@b.org"}, {"a@b.org": "viewer"})
    """
    email = claims.get("email")
    return email if isinstance(email, str) and email in operators and claims.get("email_verified") is True else None


def _by_organisation(operators: Mapping[str, str]) -> str | None:
    claims = st.user.to_dict()
    name = operator_of(claims, operators)
    if st.session_state.get("noted") != (name or "nobody"):  # once a session
        st.session_state["noted"] = name or "nobody"
        readonly = contextlib.suppress(sa.exc.DBAPIError)  # this account may only read
        with readonly, opening.writing() as opened, opened.write() as session:
            who = name or str(claims.get("email", "no e-mail address"))
            record(session, who, "log-in", "", "done" if name else "refused", "by OIDC")
    if name is None:
        st.warning("Your organisation knows you, but no operator of this fleet has your e-mail address; ask an admin.")
    return name

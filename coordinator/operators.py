"""Who may change what: roles, passwords, and the audit of every act."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from pocketfed.coordinator.store import Audit, Operator, Store, now, printable

ROLES = ("viewer", "operator", "admin")  # each may do what those before it may
# The least role for an act; an act that is not named here is the admin's.
LEAST_ROLE = {
    "look": "viewer",
    "publish": "operator", "promote": "operator", "rollback": "operator", "pause": "operator",
    "run.start": "operator", "run.stop": "operator", "device.revoke": "operator",
    "baseline.record": "operator",
}  # fmt: skip
MIN_PASSWORD, MAX_PASSWORD = 10, 1000
SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}  # 16 MB and about 50 ms a guess


class OperatorError(PermissionError):
    """An act that this person may not do, or a person that cannot be."""


@dataclass(frozen=True)
class Actor:
    """name: as the audit shows it; role: one of ROLES."""

    name: str
    role: str


def local_admin() -> Actor:
    """Whoever runs a command on the machine that holds the database: that account may write the file anyway."""
    import getpass

    try:
        return Actor(f"{getpass.getuser()}@cli", "admin")
    except (KeyError, OSError):  # a container's user without a name
        import os

        return Actor(f"uid-{os.getuid()}@cli", "admin")


def may(role: str, act: str) -> bool:
    """
    >>> may("viewer", "publish"), may("operator", "publish"), may("operator", "key.revoke"), may("nobody", "look")
    (False, True, False, False)
    """
    return role in ROLES and ROLES.index(role) >= ROLES.index(LEAST_ROLE.get(act, "admin"))


# ---- the audit -------------------------------------------------------------------------------------------------------


def record(session: Session, who: str, act: str, target: str, outcome: str, detail: str = "") -> None:
    """One line, in the session's transaction. Names and reasons may be a peer's: they are cut and made printable."""
    session.add(
        Audit(
            who=printable(who, 120),
            act=printable(act, 50),
            target=printable(target, 200),
            outcome=outcome,
            detail=printable(detail, 500),
        )
    )


@contextmanager
def acting(store: Store, actor: Actor, act: str, target: str = "") -> Iterator[Session]:
    """A transaction for an act, with its line in the audit; one that is refused or fails changes nothing but leaves a line.

    Raises:
        OperatorError: the actor's role does not allow it.
    """
    if not may(actor.role, act):
        least = LEAST_ROLE.get(act, "admin")
        with store.write() as session:
            record(session, actor.name, act, target, "refused", f"{actor.role or 'no role'}; {least} is needed")
        raise OperatorError(f"{actor.name} is {actor.role or 'without a role'}; {act} needs {least}: ask an admin")
    try:
        with store.write() as session:
            yield session
            record(session, actor.name, act, target, "done")
    except Exception as error:
        with store.write() as session:
            record(session, actor.name, act, target, "failed", f"{type(error).__name__}: {error}")
        raise


@contextmanager
def noting(store: Store, actor: Actor, act: str, target: str = "", detail: str = "") -> Iterator[None]:
    """As `acting`, for an act that makes its own transactions: the line is written when it is done, or has failed."""
    try:
        yield
    except Exception as error:
        with store.write() as session:
            record(session, actor.name, act, target, "failed", f"{type(error).__name__}: {error}")
        raise
    with store.write() as session:
        record(session, actor.name, act, target, "done", detail)


# ---- operators -------------------------------------------------------------------------------------------------------


def hash_password(password: str) -> str:
    """scrypt (RFC 7914), its cost and salt beside it."""
    salt = secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, **SCRYPT)
    cost = f"{SCRYPT['n']}:{SCRYPT['r']}:{SCRYPT['p']}"
    return "$".join(("scrypt", cost, base64.b64encode(salt).decode(), base64.b64encode(digest).decode()))


def check_password(password: str, stored: str) -> bool:
    try:
        kind, cost, salt, digest = stored.split("$")
        n, r, p = map(int, cost.split(":"))
        expected = base64.b64decode(digest)
    except ValueError:
        return False
    if kind != "scrypt" or len(password) > MAX_PASSWORD:
        return False
    given = hashlib.scrypt(password.encode(), salt=base64.b64decode(salt), n=n, r=r, p=p, maxmem=64 << 20)
    return hmac.compare_digest(given, expected)


_NOBODY = hash_password(secrets.token_urlsafe(16))  # so that a name that is not there takes as long as one that is


def _usable(session: Session, name: str) -> Operator | None:
    found = session.get(Operator, name) if name.isprintable() and len(name) <= 100 else None
    return found if found is not None and found.disabled_at is None else None


def recognise(session: Session, name: str, password: str) -> Actor | None:
    """The operator of that name and password, or None. Writes nothing: for who may only read; else `log_in`."""
    found = _usable(session, name)
    right = check_password(password, found.password if found is not None else _NOBODY)
    return Actor(found.name, found.role) if found is not None and right else None


def log_in(store: Store, name: str, password: str) -> Actor | None:
    """The operator of that name and password, or None; both leave a line in the audit.

    The password is hashed before the transaction, which on SQLite keeps everybody else from writing; within it counts
    what the operator is then.
    """
    with store.read() as session:
        known = _usable(session, name)
        hashed = known.password if known is not None else _NOBODY
    right = check_password(password, hashed)
    with store.write() as session:
        found = _usable(session, name)
        is_it = found is not None and right and found.password == hashed
        record(session, name, "log-in", "", "done" if is_it else "refused")
        return Actor(found.name, found.role) if found is not None and is_it else None


def set_operator(session: Session, name: str, role: str, password: str) -> None:
    """Make an operator, or give one another role and password.

    Raises:
        OperatorError: a name, role or password that cannot be.
    """
    if not 0 < len(name) <= 100 or not name.isprintable():
        raise OperatorError(f"the name {name[:100]!r} must have 1 to 100 printable characters")
    if role not in ROLES:
        raise OperatorError(f"there is no role {role!r}; choose one of {', '.join(ROLES)}")
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise OperatorError(f"the password has {len(password)} characters; give {MIN_PASSWORD} to {MAX_PASSWORD}")
    found = session.get(Operator, name)
    if found is None:
        session.add(Operator(name=name, role=role, password=hash_password(password)))
    else:
        found.role, found.password, found.disabled_at = role, hash_password(password), None


def disable_operator(session: Session, name: str) -> None:
    """
    Raises:
        OperatorError: there is none of that name.
    """
    found = session.get(Operator, name) if name.isprintable() else None
    if found is None:
        raise OperatorError(f"there is no operator {name[:100]!r}; `pocketfed operator list` names them")
    found.disabled_at = found.disabled_at or now()


def all_operators(session: Session) -> list[Operator]:
    return list(session.scalars(sa.select(Operator).order_by(Operator.name)))


def audit_lines(session: Session, most: int = 100) -> list[Audit]:
    """The newest first."""
    return list(session.scalars(sa.select(Audit).order_by(Audit.id.desc()).limit(most)))

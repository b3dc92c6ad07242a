"""certs, keys, enrolment-key, devices, operator, audit: who may come in, and what an operator may undo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfed.cli.database import opened
from pocketfed.cli.options import Database, Json, KeysFolder, group
from pocketfed.cli.output import CommandError, format_moment, print_json, print_rows

UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


keys = group("The publisher's keys, which sign what devices run.")
enrolment_key = group("Keys that let devices enrol: so many, until some day.")
devices = group("The devices of a fleet.")
operator = group("People who may look, act or administer.")


def parse_duration_s(text: str) -> float:
    """
    >>> parse_duration_s("90m"), parse_duration_s("7d")
    (5400.0, 604800.0)

    Raises:
        CommandError: not a number with m, h, d or w.
    """
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS_S or not number.isdigit() or not 0 < int(number) <= 10_000:
        raise CommandError(f"{text!r} is not a time; give a number with m, h, d or w, e.g. 7d")
    return float(int(number) * UNITS_S[unit])


# ---- certificates ----------------------------------------------------------------------------------------------------


def certs(
    out: Annotated[Path, typer.Option(help="The folder for ca.pem, ca.key, server.pem and server.key.")],
    host: Annotated[list[str], typer.Option(help="A name or address that devices connect to. May be repeated.")],
    days: Annotated[int, typer.Option(min=1, max=397, help="How long the server's certificate holds.")] = 397,
) -> None:
    """Make a certificate authority and a server certificate; again, to renew the latter by the same authority."""
    from pocketfed.coordinator.tls import CA_FILE, make_certificates

    tls = make_certificates(out, host, days)
    print(f"certificate for {', '.join(host)}: {tls.certificate}; give devices {out / CA_FILE} and nothing else")


# ---- the publisher's keys --------------------------------------------------------------------------------------------


@keys.command("create")
def keys_create(database: Database, folder: KeysFolder = None) -> None:
    """Make a root key and a signing key; `publish` does so too where there are none."""
    from pocketfed.coordinator.operators import acting, local_admin
    from pocketfed.coordinator.signing import create_keys, keys_folder, newest_list

    with opened(database) as store:
        place = folder or keys_folder(store)
        with acting(store, local_admin(), "key.create", str(place)) as session:
            create_keys(session, place)
            made = newest_list(session)
            assert made is not None
            print(
                f"publisher {made.publisher}; devices that are to run nothing else: --publisher. Keep {place / 'root.key'} safe"
            )


@keys.command("list")
def keys_list(database: Database, json: Json = False) -> None:
    """Show the publisher and which keys sign for it."""
    from pocketfed.coordinator.signing import listed_keys, newest_list

    with opened(database) as store, store.read() as session:
        newest = newest_list(session)
        listed = listed_keys(newest)
        rows = [
            {"key": i, "state": "revoked" if k["revoked"] else "good", "public": k["public"]} for i, k in listed.items()
        ]
        if json:
            print_json({"publisher": newest.publisher if newest else None, "keys": rows})
        else:
            print_rows(f"publisher {newest.publisher}" if newest else "no publisher yet", rows, False)


@keys.command("rotate")
def keys_rotate(database: Database, folder: KeysFolder = None) -> None:
    """Sign with a new key from now on; the older ones stay good until they are revoked."""
    from pocketfed.coordinator.operators import acting, local_admin
    from pocketfed.coordinator.signing import current_key, keys_folder, open_keys, rotate_keys

    with opened(database) as store, acting(store, local_admin(), "key.rotate") as session:
        name, _ = current_key(session, rotate_keys(session, open_keys(folder or keys_folder(store))))
        print(f"signing with {name} from now on")


@keys.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(help="Its id, as `keys list` shows it.")],
    database: Database,
    folder: KeysFolder = None,
    again: Annotated[
        bool,
        typer.Option(
            "--sign-again", help="Sign what the channels run now anew: it is ours, whatever else that key signed."
        ),
    ] = False,
) -> None:
    """What this key has signed is refused by devices from their next check-in on."""
    from pocketfed.coordinator.operators import acting, local_admin
    from pocketfed.coordinator.signing import keys_folder, open_keys, revoke_signing_key, sign_again

    with opened(database) as store, acting(store, local_admin(), "key.revoke", key) as session:
        left = revoke_signing_key(session, open_keys(folder or keys_folder(store)), key)
        signed = sign_again(session, left) if again else []
        print(f"revoked {key}" + (f"; signed again: {', '.join(signed)}" if signed else ""))


# ---- enrolment -------------------------------------------------------------------------------------------------------


@enrolment_key.command("create")
def enrolment_key_create(
    database: Database,
    quota: Annotated[int, typer.Option(min=1, help="Devices that may enrol with it.")],
    expires: Annotated[str, typer.Option(help="After how long: a number with m, h, d or w; or never.")] = "7d",
    cohort: Annotated[str, typer.Option(help="A name for the devices that come with it.")] = "",
    round_cap: Annotated[int, typer.Option(min=0, help="At most so many of them in one round; 0: no limit.")] = 0,
    json: Json = False,
) -> None:
    """Make an enrolment key and print it, this once: only its hash is kept. From now on nobody enrols without one."""
    from datetime import timedelta

    from pocketfed.coordinator.enrolment import create_key
    from pocketfed.coordinator.operators import acting, local_admin
    from pocketfed.coordinator.store import now

    end = None if expires == "never" else now() + timedelta(seconds=parse_duration_s(expires))
    with opened(database) as store:
        with acting(store, local_admin(), "enrolment-key.create", f"{cohort} {quota}".strip()) as session:
            number, key = create_key(session, quota, end, cohort, round_cap)
        if json:
            print_json({"id": number, "key": key, "quota": quota, "cohort": cohort, "expires_at": format_moment(end)})
        else:
            print(key)


@enrolment_key.command("list")
def enrolment_key_list(database: Database, json: Json = False) -> None:
    """Show what each key has let in, and until when."""
    from pocketfed.coordinator.enrolment import enrolment_keys

    with opened(database) as store, store.read() as session:
        rows = [
            {"id": k.id, "cohort": k.cohort, "used": k.used, "quota": k.quota, "round_cap": k.round_cap,
             "expires_at": format_moment(k.expires_at), "revoked_at": format_moment(k.revoked_at)}
            for k in enrolment_keys(session)
        ]  # fmt: skip
    print_rows("enrolment keys", rows, json)


@enrolment_key.command("revoke")
def enrolment_key_revoke(
    number: Annotated[int, typer.Argument(help="As `list` shows it.")], database: Database
) -> None:
    """No more devices with this key; those that came with it stay."""
    from pocketfed.coordinator.enrolment import revoke_key
    from pocketfed.coordinator.operators import acting, local_admin

    with opened(database) as store, acting(store, local_admin(), "enrolment-key.revoke", str(number)) as session:
        revoke_key(session, number)


@devices.command("list")
def devices_list(
    database: Database, most: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100, json: Json = False
) -> None:
    """Show devices, and which were revoked or use one credential at two places."""
    from pocketfed.coordinator.enrolment import newest_devices

    with opened(database) as store, store.read() as session:
        rows = [
            {"name": d.name, "channel": d.channel, "cohort": d.cohort, "examples": d.examples, "release": d.release_id,
             "last_seen_at": format_moment(d.last_seen_at), "shared_at": format_moment(d.shared_at),
             "revoked_at": format_moment(d.revoked_at)}
            for d in newest_devices(session, most)
        ]  # fmt: skip
    print_rows("devices", rows, json)


@devices.command("revoke")
def devices_revoke(name: Annotated[str, typer.Argument()], database: Database) -> None:
    """Refuse a device from its next call on."""
    from pocketfed.coordinator.enrolment import revoke_device
    from pocketfed.coordinator.operators import acting, local_admin

    with opened(database) as store, acting(store, local_admin(), "device.revoke", name) as session:
        revoke_device(session, name)


# ---- people ----------------------------------------------------------------------------------------------------------


@operator.command("set")
def operator_set(
    name: Annotated[str, typer.Argument()],
    database: Database,
    role: Annotated[str, typer.Option(help="viewer, operator or admin.")],
    password_file: Annotated[Path | None, typer.Option(help="Read the password from here instead of asking.")] = None,
) -> None:
    """Make an operator, or give one another role and password."""
    from getpass import getpass

    from pocketfed.coordinator.operators import acting, local_admin, set_operator

    if password_file:
        password = password_file.read_text().rstrip("\r\n")
    else:
        try:
            password, again = getpass(f"password of {name}: "), getpass("once more: ")
        except EOFError:
            raise CommandError(
                "the password was not typed twice, so nothing was changed; type it, or give --password-file"
            ) from None
        if again != password:
            raise CommandError("the two passwords are not the same; nothing was changed, try again")
    with opened(database) as store:
        with acting(store, local_admin(), "operator.set", f"{name} {role}") as session:
            set_operator(session, name, role, password)
        print(f"{name} may log in as {role} to {store.name}")


@operator.command("disable")
def operator_disable(name: Annotated[str, typer.Argument()], database: Database) -> None:
    """Let an operator log in no more."""
    from pocketfed.coordinator.operators import acting, disable_operator, local_admin

    with opened(database) as store, acting(store, local_admin(), "operator.disable", name) as session:
        disable_operator(session, name)


@operator.command("list")
def operator_list(database: Database, json: Json = False) -> None:
    """Show who may do what."""
    from pocketfed.coordinator.operators import all_operators

    with opened(database) as store, store.read() as session:
        rows = [
            {
                "name": o.name,
                "role": o.role,
                "created_at": format_moment(o.created_at),
                "disabled_at": format_moment(o.disabled_at),
            }
            for o in all_operators(session)
        ]
    print_rows("operators", rows, json)


def audit(database: Database, most: Annotated[int, typer.Option(min=1)] = 50, json: Json = False) -> None:
    """Show who did what, when, and how it ended; the newest first."""
    from pocketfed.coordinator.operators import audit_lines

    with opened(database) as store, store.read() as session:
        rows = [
            {
                "at": f"{a.at:%Y-%m-%d %H:%M:%S}",
                "who": a.who,
                "act": a.act,
                "target": a.target,
                "outcome": a.outcome,
                "detail": a.detail,
            }
            for a in audit_lines(session, most)
        ]
    print_rows("audit", rows, json)

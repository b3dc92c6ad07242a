"""dashboard: pages of a database in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfed.cli.listening import check_free
from pocketfed.cli.options import Database
from pocketfed.cli.output import CommandError
from pocketfed.cli.stopping import on_termination


def dashboard(
    database: Database,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8501,
    address: Annotated[
        str, typer.Option(help="To listen on; other machines can look in only if this is not loopback.")
    ] = "127.0.0.1",
    certs: Annotated[
        Path | None,
        typer.Option(help="A folder of `pocketfed certs`, for HTTPS; needed where other machines can look in."),
    ] = None,
    allow_plaintext_off_loopback: Annotated[
        bool,
        typer.Option(
            "--allow-plaintext-off-loopback", help="No TLS: who is in between reads passwords; e.g. behind a proxy."
        ),
    ] = False,
) -> None:
    """Show runs, devices and models of a database in the browser; operators log in (docs/dashboard)."""
    import importlib.util
    import subprocess

    from pocketfed.coordinator.store import Store, database_url
    from pocketfed.dashboard.launch import command, environment, is_loopback

    if importlib.util.find_spec("streamlit") is None:
        raise ModuleNotFoundError(name="streamlit")
    url = database_url(database)
    if url.get_backend_name() != "sqlite" or Path(url.database or "").exists():  # else it waits for the first run
        Store(database, create=False).close()
    tls = _https(certs)
    if tls is None and not is_loopback(address) and not allow_plaintext_off_loopback:
        raise CommandError(
            f"--address {address} lets other machines look in, and log-ins would cross the network in plain text; give "
            "--certs, or --allow-plaintext-off-loopback where a proxy does TLS"
        )
    check_free(f"{address}:{port}")
    print(f"dashboard on http{'s' if tls else ''}://{address}:{port}", flush=True)
    process = subprocess.Popen(command(port, address, tls), env=environment(database, address))
    on_termination(process.terminate)
    raise typer.Exit(max(0, process.wait()))


def _https(certs: Path | None) -> tuple[str, str] | None:
    """Certificate and key of a folder, to serve pages with."""
    if certs is None:
        return None
    from pocketfed.coordinator.tls import find_tls

    found = find_tls(certs)
    if found is None:
        raise CommandError(
            f"there is no certificate in {certs}; make one with `pocketfed certs --out {certs} --host NAME`"
        )
    return str(found.certificate), str(found.key)

"""serve: devices are let in, and runs are driven."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfed.cli.driving import check_run, drive, grid_of, unfinished
from pocketfed.cli.listening import check_free
from pocketfed.cli.options import Database
from pocketfed.cli.output import CommandError, check_json
from pocketfed.cli.stopping import on_termination, wait

FILES = 65536  # open at once, at most


def serve(
    database: Database,
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 for any free one.")] = "127.0.0.1:8765",
    run: Annotated[Path | None, typer.Option(help="A run to drive, as TOML.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the run: NAME=VALUE, local.NAME=VALUE.")
    ] = None,
    enrolment_key: Annotated[
        str, typer.Option(envvar="POCKETFED_ENROLMENT_KEY", help="Devices must know it to enrol.")
    ] = "",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with unfinished runs of the database, or give them up.")
    ] = True,
    spool: Annotated[
        Path | None, typer.Option(help="Where uploads wait for their round; by default beside the database.")
    ] = None,
    certs: Annotated[
        Path | None,
        typer.Option(help="A folder of `pocketfed certs`, for TLS; needed where other machines can connect."),
    ] = None,
    allow_plaintext_off_loopback: Annotated[
        bool,
        typer.Option("--allow-plaintext-off-loopback", help="No TLS: who is in between reads tokens and updates."),
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Answer Prometheus there; 0 for any free port.")
    ] = None,
    health_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Tell the health (gRPC) there too, also while another coordinator serves."),
    ] = None,
    watch_address: Annotated[
        str, typer.Option(help="Where --metrics-port and --health-port listen; they are open to who can connect.")
    ] = "127.0.0.1",
    log_format: Annotated[str, typer.Option(help="text, or json: one object a line, on stdout.")] = "text",
    exit_when_done: Annotated[bool, typer.Option(help="End when the run has ended.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the run's rounds to this file when it has ended.")] = None,
) -> None:
    """Serve artifacts and assignments to devices, and drive a run: one that was left unfinished, or the one given."""
    import contextlib
    import dataclasses
    import threading

    from pocketfed.coordinator.config import load_run_config
    from pocketfed.coordinator.health import Health
    from pocketfed.coordinator.leadership import lead
    from pocketfed.coordinator.logs import FORMATS, logging_as
    from pocketfed.coordinator.server import CoordinatorServer, ServerConfig, check_listen, default_spool
    from pocketfed.coordinator.store import Store, database_url
    from pocketfed.coordinator.tls import find_tls
    from pocketfed.coordinator.vitals import Recorder, Tally

    if log_format not in FORMATS:
        raise CommandError(f"--log-format is {log_format!r}; choose one of {', '.join(FORMATS)}")
    tls = find_tls(certs) if certs else None
    if certs and tls is None:
        raise CommandError(
            f"there is no certificate in {certs}; make one with `pocketfed certs --out {certs} --host NAME`"
        )
    config = load_run_config(run, set_ or []) if run is not None or set_ else None
    test = check_run(config) if config is not None else ()
    check_json(json)
    serving = ServerConfig(
        listen,
        enrolment_key=enrolment_key,
        tls=tls,
        allow_plaintext_off_loopback=allow_plaintext_off_loopback,
    )
    url = database_url(database)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        check_free(listen)  # before a database is made; where there is one, its coordinator may use the port still
    check_listen(serving)
    _allow_many_connections()
    with contextlib.ExitStack() as stack:
        say = stack.enter_context(logging_as(log_format))
        store = Store(database)
        stack.callback(store.close)
        stopping = threading.Event()
        on_termination(stopping.set)
        place, health, tally = spool or default_spool(store), Health(), Tally()
        if health_port is not None:
            bound = stack.enter_context(health.served(watch_address, health_port))
            say.info("health on %s:%d", watch_address, bound)
        if metrics_port is not None:
            from pocketfed.coordinator.metrics import Metrics, serve_metrics

            metrics = Metrics(store, place, tally, lambda: health.leads)
            bound = stack.enter_context(serve_metrics(metrics, watch_address, metrics_port))
            say.info("metrics on http://%s:%d/metrics", watch_address, bound)

        def tell_waiting(holder: str) -> None:
            say.info("another coordinator (%s) serves this database; waiting to take over", holder)

        leadership = stack.enter_context(lead(store, place, tell_waiting, stopping.is_set))
        if leadership is None:
            return
        host = check_free(listen)
        left = unfinished(store, resume)
        configs = [c for _, c in left] + ([config] if config is not None else [])
        if configs:
            serving = dataclasses.replace(serving, lease_s=configs[0].lease_s)
        server = CoordinatorServer(store, serving, place, health, tally)
        server.assignments.sweep()
        for run_id, left_config in left:  # before a device can hear that its time was up
            grid_of(store, server, run_id, left_config).reopen(left_config.deadline_s)
        with server, Recorder(store, place, tally):
            say.info("listening on %s:%d%s", host, server.port, ", with TLS" if tls else "")
            for run_id, left_config in left:
                say.info("run %d: goes on where it was left", run_id, extra={"run": run_id})
                drive(store, server, run_id, left_config, check_run(left_config), json, stopping.is_set, log_format)
            if config is not None and config not in [c for _, c in left]:
                drive(store, server, None, config, test, json, stopping.is_set, log_format)
            if not (configs and exit_when_done):
                say.info("serving until Ctrl-C")
                wait(stopping)


def _allow_many_connections() -> None:
    """As many open files as the system allows without asking: each device is one."""
    import contextlib

    with contextlib.suppress(
        ImportError, ValueError, OSError
    ):  # not on Windows; macOS may have a lower limit of its own
        import resource

        soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if most < 0 else min(most, FILES)
        if 0 <= soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))

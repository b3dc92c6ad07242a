"""publish, serve, dashboard: what concerns a fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pocketfed.cli.output import (
    CommandError,
    check_database,
    check_json,
    format_bytes,
    print_json,
    print_round,
    print_round_header,
    write_json,
)
from pocketfed.cli.stopping import on_termination, wait

if TYPE_CHECKING:
    from logging import Logger

    from pocketfed.coordinator.config import RunConfig
    from pocketfed.coordinator.grid import FleetGrid
    from pocketfed.coordinator.server import CoordinatorServer
    from pocketfed.coordinator.store import Store
    from pocketfed.model.tasks import Example

T = TypeVar("T")
FILES = 65536  # open at once, at most
Database = Annotated[str, typer.Option(help="A file for SQLite, or any SQLAlchemy URL.")]
KeysFolder = Annotated[
    Path | None, typer.Option("--keys", help="The publisher's private keys; by default beside the database.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def publish(
    channel: Annotated[str, typer.Option(help="Devices follow a channel.")],
    database: Database,
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="[MODEL]",
            show_default=False,
            help="A model folder, `shipped` for the package's own student (the default), or an artifact built with --out.",
        ),
    ] = Path("shipped"),
    labels: Annotated[
        str, typer.Option(help="What the classifier tells apart: A,B,C, or a data set to read them from.")
    ] = "",
    train: Annotated[
        list[str] | None,
        typer.Option(help="Trainable sets to build plans for; the first is released. May be repeated."),
    ] = None,
    activations: Annotated[
        str, typer.Option(help="float32, or int8: faster, a little less exact; for an int8 student.")
    ] = "float32",
    max_length: Annotated[int, typer.Option(min=3, help="Tokens; longer texts are cut.")] = 64,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Keep the artifact's folder here.")] = None,
    keys: KeysFolder = None,
    supersede: Annotated[
        bool,
        typer.Option("--supersede", help="What the channel ran before has a fault: it is not trained on any more."),
    ] = False,
    rollout: Annotated[
        float, typer.Option(help="Percent of the channel's devices that get it at first; docs/releases.md.")
    ] = 100.0,
    margin: Annotated[
        float, typer.Option(help="It is halted if a cohort loses more accuracy than that, 0 to 1.")
    ] = 0.02,
    loss_margin: Annotated[
        float, typer.Option(help="Likewise for loss, in nats, where the accuracy is no better.")
    ] = 0.1,
    min_devices: Annotated[
        int | None,
        typer.Option(help="Judge a cohort once so many of its devices have reported; by default 5 of a rollout."),
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Go on to more devices while no cohort is worse.")] = False,
    min_sdk: Annotated[str, typer.Option(help="The oldest SDK that may have it.")] = "",
    max_sdk: Annotated[str, typer.Option(help="The newest; 0.3 takes in 0.3.5.")] = "",
    json: Json = False,
) -> None:
    """Build an artifact (plans, int8 backbone, tokenizer, manifest), sign it and release it on a channel."""
    import tempfile

    from pocketfed.coordinator.artifacts import MANIFEST, publish_artifact, read_artifact
    from pocketfed.coordinator.operators import acting, local_admin
    from pocketfed.coordinator.rollout import Rollout
    from pocketfed.coordinator.signing import ensure_keys, keys_folder, newest_list
    from pocketfed.coordinator.store import Store

    if not 0 < len(channel) <= 100:
        raise CommandError(f"--channel is {channel[:100]!r}; give a name of 1 to 100 characters")
    plan = Rollout(rollout, margin, loss_margin, min_devices, min_sdk, max_sdk, auto)
    check_database(database)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        if (model_dir / MANIFEST).is_file():
            if labels or out:
                raise CommandError(f"{model_dir} is an artifact already; --labels and --out are for a model folder")
            built = read_artifact(model_dir)
        else:
            folder = out or Path(scratch) / "artifact"
            built = _build(model_dir, folder, labels, train or ["lora:8"], activations, max_length, seed, quiet=json)
        store = Store(database)
        try:
            with acting(store, local_admin(), "publish", f"{channel} {built.version}") as session:
                signing = ensure_keys(session, keys or keys_folder(store))
                chosen = train[0] if train else None
                who = local_admin().name
                release = publish_artifact(session, built, channel, chosen, signing, supersede, plan, who)
                publisher = newest_list(session)
                released = {
                    "release": release.id,
                    "trainable_set": release.trainable_set,
                    "publisher": publisher.publisher if publisher else None,
                }
        finally:
            store.close()
    total = sum(f["bytes"] for f in built.manifest["files"].values())
    report = {
        "version": built.version,
        "channel": channel,
        "percent": rollout,
        "bytes": total,
        "sizes": built.manifest["sizes"],
        **released,
    }
    if json:
        print_json(report)
    else:
        trained = released["trainable_set"]
        to = f"{rollout:g} % of {channel!r}" if rollout < 100 else repr(channel)
        print(f"released {built.version[:12]} ({format_bytes(total)}) on {to}, training {trained}")


def _build(
    model_dir: Path,
    folder: Path,
    labels: str,
    sets: list[str],
    activations: str,
    max_length: int,
    seed: int,
    quiet: bool,
) -> Any:
    from pocketfed.coordinator.artifacts import build_artifact, label_names
    from pocketfed.model.checkpoints import load, tokens_of
    from pocketfed.model.shipped import located

    model_dir = located(model_dir)
    checkpoint = load(model_dir)
    names = label_names(checkpoint, labels, model_dir)
    return build_artifact(
        folder,
        config=checkpoint.config,
        state=checkpoint.state,
        vocabulary=tokens_of(checkpoint),
        labels=names,
        trainable_sets=sets,
        quantized=checkpoint.quantization is not None,
        keep=checkpoint.kept_float,
        activations=activations,
        max_length=max_length,
        preset=model_dir.resolve().name,
        head_labels=checkpoint.labels,
        seed=seed,
        progress=lambda step: None if quiet else print(f"{step} ...", flush=True),
    )


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
    test = _check_run(config) if config is not None else ()
    check_json(json)
    serving = ServerConfig(
        listen,
        enrolment_key=enrolment_key,
        tls=tls,
        allow_plaintext_off_loopback=allow_plaintext_off_loopback,
    )
    url = database_url(database)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        _check_free(listen)  # before a database is made; where there is one, its coordinator may use the port still
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
        leadership = stack.enter_context(lead(store, place, _tell_waiting, stopping.is_set))
        if leadership is None:
            return
        host = _check_free(listen)
        left = _unfinished(store, resume)
        configs = [c for _, c in left] + ([config] if config is not None else [])
        if configs:
            serving = dataclasses.replace(serving, lease_s=configs[0].lease_s)
        server = CoordinatorServer(store, serving, place, health, tally)
        server.assignments.sweep()
        for run_id, left_config in left:  # before a device can hear that its time was up
            _grid(store, server, run_id, left_config).reopen(left_config.deadline_s)
        with server, Recorder(store, place, tally):
            say.info("listening on %s:%d%s", host, server.port, ", with TLS" if tls else "")
            for run_id, left_config in left:
                say.info("run %d: goes on where it was left", run_id, extra={"run": run_id})
                _drive(store, server, run_id, left_config, _check_run(left_config), json, stopping.is_set, log_format)
            if config is not None and config not in [c for _, c in left]:
                _drive(store, server, None, config, test, json, stopping.is_set, log_format)
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


def _say() -> Logger:
    """What `serve` tells whoever started it."""
    import logging

    return logging.getLogger("pocketfed.serve")


def _tell_waiting(holder: str) -> None:
    _say().info("another coordinator (%s) serves this database; waiting to take over", holder)


def _unfinished(store: Store, resume: bool) -> list[tuple[int, RunConfig]]:
    """Runs that a coordinator has left, with their configurations; given up instead if they are not to go on."""
    from pocketfed.coordinator.config import RunConfig
    from pocketfed.coordinator.progress import give_up, unfinished_runs
    from pocketfed.coordinator.store import Run

    left = []
    for run_id in unfinished_runs(store):
        if resume:
            with store.read() as session:
                left.append((run_id, RunConfig.from_dict(session.get_one(Run, run_id).config)))
        else:
            give_up(store, run_id, "given up by the operator")
            with store.read() as session:
                name = session.get_one(Run, run_id).name
            _note(store, "run.stop", name, f"run {run_id} given up")
            _say().info("run %d: given up", run_id, extra={"run": run_id})
    return left


def _note(store: Store, act: str, target: str, detail: str = "") -> None:
    """A line in the audit: whoever may run this command has done that."""
    from pocketfed.coordinator.operators import local_admin, record

    with store.write() as session:
        record(session, local_admin().name, act, target, "done", detail)


def _grid(store: Store, server: CoordinatorServer, run_id: int, config: RunConfig) -> FleetGrid:
    from pocketfed.coordinator.grid import FleetGrid
    from pocketfed.coordinator.progress import starting_theta
    from pocketfed.coordinator.strategy import asks_more

    _, size = starting_theta(store, run_id)
    offer_s = min(config.lease_s, config.offer_s)
    forms = not config.update.plain or asks_more(config.strategy)
    return FleetGrid(server.assignments, run_id, lambda: server.online(config.channel, forms), size, offer_s)


def _check_run(config: RunConfig) -> Sequence[Example]:
    """The run's test examples; a strategy or test data that cannot be used is told before anything is written."""
    from pocketfed.coordinator.strategy import make_strategy
    from pocketfed.model.tasks import read_dataset

    make_strategy(config.strategy, config.strategy_options)
    if not config.test_data:
        return ()
    dataset = read_dataset(config.test_data, labelled=False)
    return dataset.test or dataset.train


def _drive(
    store: Store,
    server: CoordinatorServer,
    run_id: int | None,
    config: RunConfig,
    test: Sequence[Example],
    json: Path | None,
    should_stop: Callable[[], bool],
    log_format: str = "text",
) -> None:
    """Drive a run, or a new one, to its end. Where the database or the disk fails, the run waits for them."""
    import contextlib
    import tempfile
    from hashlib import sha256

    from pocketfed.coordinator.operators import local_admin, noting
    from pocketfed.coordinator.progress import create_run, results_of
    from pocketfed.coordinator.rounds import drive_run
    from pocketfed.coordinator.store import OUTAGES, Run, StoreError

    known = run_id is not None
    told = f"on {config.channel}" + (", where it was left" if known else "")
    with noting(store, local_admin(), "run.start", config.name, told):
        run_id = create_run(store, config) if run_id is None else run_id
    grid = _grid(store, server, run_id, config)
    _say().info("run %d: waiting for %d devices", run_id, config.min_devices, extra={"run": run_id})
    _say().info("run %d collects: %s", run_id, config.update, extra={"run": run_id})
    tell_round = _teller(run_id, log_format)
    with tempfile.TemporaryDirectory(prefix="pocketfed-") as scratch:
        evaluate = _test_set(store, run_id, config, test, Path(scratch)) if test else None
        forget = server.assignments.forget
        try:
            theta = _patiently(
                lambda: drive_run(store, run_id, grid, config, evaluate, tell_round, forget, should_stop), should_stop
            )
        finally:
            if should_stop():
                with contextlib.suppress(StoreError, *OUTAGES):
                    _note(store, "run.stop", config.name)
    if json is not None:
        write_json(
            json,
            {
                "run": run_id,
                "rounds": [result.to_dict() for result in results_of(store, run_id)],
                "seed": config.seed,
                "parameters_sha256": sha256(theta.tobytes()).hexdigest(),
            },
        )
    with store.read() as session:
        kept_back = session.get_one(Run, run_id).reason
    to = f"{config.rollout:g} % of {config.channel!r}" if config.rollout < 100 else repr(config.channel)
    released = f"; released on {to}" if config.release else ""
    _say().info("run %d finished%s", run_id, f"; {kept_back}" if kept_back else released, extra={"run": run_id})


def _teller(run_id: int, log_format: str) -> Callable[[Any], None]:
    """Tells of each round: a row of a table, or a line of the log."""
    if log_format == "text":
        print_round_header()
        return print_round
    told = ("status", "devices", "failed", "accuracy", "loss", "seconds")

    def tell(result: Any) -> None:
        fields = {name: getattr(result, name) for name in told} | {"run": run_id, "round": result.number}
        _say().info("round %d %s%s", result.number, result.status, _because(result.reason), extra=fields)

    return tell


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _patiently(drive: Callable[[], T], should_stop: Callable[[], bool]) -> T:
    """Again, after ever longer pauses, while the database cannot be reached or the disk is full."""
    import time

    from pocketfed.coordinator.store import is_outage

    pause = 1.0
    while True:
        try:
            return drive()
        except Exception as error:
            if not is_outage(error) or should_stop():
                raise
            why = " ".join(str(getattr(error, "orig", None) or error).split())
            _say().warning("cannot go on: %s; trying again in %.0f s", why, pause)
        end = time.monotonic() + pause
        while time.monotonic() < end and not should_stop():
            time.sleep(0.1)
        pause = min(60.0, pause * 2)


def _test_set(
    store: Store, run_id: int, config: RunConfig, test: Sequence[Example], scratch: Path
) -> Callable[[Any], Mapping[str, float]]:
    """Measures theta on the run's test_data, with the very plans that devices use."""
    from pocketfed.client_sdk.artifacts import open_artifact
    from pocketfed.client_sdk.plan_trainer import PlanTrainer
    from pocketfed.client_sdk.trainer import evaluate
    from pocketfed.coordinator.artifacts import export_artifact
    from pocketfed.coordinator.store import Run
    from pocketfed.simulations.run import encode_examples

    with store.read() as session:
        run = session.get_one(Run, run_id)
        export_artifact(session, run.artifact_version, scratch / "artifact")
        trainer = PlanTrainer(open_artifact(scratch / "artifact", run.artifact_version), run.trainable_set)
    examples = encode_examples(trainer, test, config.local.max_length)
    if not len(examples):
        known = ", ".join(trainer.artifact.manifest.labels[:10])
        raise CommandError(f"no example of test_data {config.test_data} has a label of the artifact ({known})")
    return lambda theta: evaluate(trainer, theta, examples)


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
    _check_free(f"{address}:{port}")
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


def _check_free(listen: str) -> str:
    """The host of HOST:PORT, if one can listen there now: better told before a database is made.

    Raises:
        CommandError: not an address, not of this machine, or taken.
    """
    import socket

    host, _, port = listen.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise CommandError(f"{listen!r} is not HOST:PORT, e.g. 127.0.0.1:8765")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise CommandError(f"cannot listen on {listen}: {why}; choose another port or address") from None
    return host

"""health: whether a coordinator lives and is ready; light, since a container asks every few seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfed.cli.output import CommandError

CHECK = "/grpc.health.v1.Health/Check"
STATUS = {0: "unknown", 1: "serving", 2: "not serving", 3: "unknown service"}


def health(
    coordinator: Annotated[str, typer.Argument(help="HOST:PORT, of --listen or --health-port.")],
    service: Annotated[
        str, typer.Option(help='Whether it is ready to serve; "" for whether the process lives.')
    ] = "pocketfed.v1.Fleet",
    ca: Annotated[
        Path | None, typer.Option(help="The CA of the coordinator's certificate, for a port with TLS.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds.")] = 5.0,
) -> None:
    """Ask a coordinator whether it is ready; exit code 0 if so, 1 if not (gRPC's health protocol)."""
    import grpc

    options = [("grpc.enable_http_proxy", 0)]
    if ca is None:
        channel = grpc.insecure_channel(coordinator, options)
    else:
        channel = grpc.secure_channel(coordinator, grpc.ssl_channel_credentials(ca.read_bytes()), options)
    name = service.encode()
    if len(name) > 127:
        raise CommandError(f"--service is {service[:40]!r}...; give the name of a service, e.g. pocketfed.v1.Fleet")
    with channel:
        try:  # HealthCheckRequest has one string, HealthCheckResponse one number: no package is needed to read them
            reply = channel.unary_unary(CHECK, None, None)(
                b"\n" + bytes([len(name)]) + name if name else b"", timeout=timeout
            )
        except grpc.RpcError as error:
            why = " ".join((error.details() or "").split())[:200]
            raise CommandError(f"{coordinator} does not tell its health: {error.code().name.lower()}, {why}") from None
    status = STATUS.get(reply[1] if len(reply) == 2 else 0, "unknown")
    if status != "serving":
        raise CommandError(f"{coordinator} is {status}")
    print(f"{coordinator} is {status}")

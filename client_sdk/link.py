"""The gRPC link to the coordinator: the calls of distribution.proto and fleet.proto, with errors as sentences."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from pocketfed.client_sdk.errors import ConfigurationError, LinkError
from pocketfed.client_sdk.version import SDK_VERSION
from pocketfed.protos import distribution_pb2 as distribution
from pocketfed.protos import distribution_pb2_grpc, fleet_pb2_grpc
from pocketfed.protos import fleet_pb2 as fleet

PROTOCOL = 1
UPLOAD_BYTES = 1 << 19  # of data in one message
CALL_TIMEOUT_S = 30.0
TRANSFER_TIMEOUT_S = 600.0
INSTANCE, RETRY_AFTER = "pocketfed-instance", "retry-after-s"  # metadata keys
HANDSHAKE_FAILED = ("CERTIFICATE_VERIFY_FAILED", "ostname", "WRONG_VERSION_NUMBER", "SSL_ERROR")
DECLINE_TIMEOUT_S = 2.0  # a courtesy: the lease ends the assignment anyway

log = logging.getLogger("pocketfed")
log.addHandler(logging.NullHandler())


def is_loopback(host: str) -> bool:
    """
    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("127.example.org")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _read_ca(ca: str | os.PathLike[str] | None) -> bytes | None:
    """None: the authorities that gRPC brings."""
    if ca is None:
        return None
    try:
        data = Path(ca).expanduser().read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read ca {os.fspath(ca)}: {error.strerror}; give the PEM file of the CA"
        ) from None
    if b"-----BEGIN CERTIFICATE-----" not in data:
        raise ConfigurationError(f"ca {os.fspath(ca)} holds no certificate in PEM; give `ca.pem` of `pocketfed certs`")
    return data


def _tls_reason(details: str) -> str:
    """
    >>> _tls_reason("last error: UNAVAILABLE: ipv4:127.0.0.1:1: SSL_ERROR_SSL: error:1:SSL:x:CERTIFICATE_VERIFY_FAILED: self signed")
    'certificate verify failed'
    """
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "certificate verify failed"
    return "its certificate names another host" if "ostname" in details else "no TLS there"


class Link:
    """A connection, made when it is first used and made again when it broke.

    TLS to another machine, by the system's authorities or those in `ca`; plaintext on loopback where no `ca` is given.

    Args:
        coordinator: HOST:PORT.
        token: from `enrol`, for all other calls.
        ca: a PEM file with the authorities that may have signed the coordinator's certificate.
        allow_plaintext_off_loopback: no TLS to another machine: who is in between reads the token and the updates.
        on_bytes: told the size of messages sent and received, from whichever thread.

    Raises:
        ConfigurationError: no port, or a `ca` that cannot be read.
    """

    def __init__(
        self,
        coordinator: str,
        token: str = "",
        ca: str | os.PathLike[str] | None = None,
        allow_plaintext_off_loopback: bool = False,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        host, colon, port = coordinator.rpartition(":")
        if not (colon and host and port.isdigit()):
            raise ConfigurationError(f"{coordinator!r} is not HOST:PORT, e.g. 127.0.0.1:8765")
        self.encrypted = ca is not None or not (is_loopback(host) or allow_plaintext_off_loopback)
        if not self.encrypted and not is_loopback(host):
            log.warning("the link to %s is not encrypted: tokens and updates can be read on the way", coordinator)
        self.coordinator, self.token, self._on_bytes = coordinator, token, on_bytes
        # Names this process: a token that two processes use in turns is noticed. Random, and never on disk.
        self._instance = secrets.token_hex(8)
        options: list[tuple[str, int]] = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_receive_message_length", 4 << 20),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
        ]
        if self.encrypted:
            self._channel = grpc.secure_channel(coordinator, grpc.ssl_channel_credentials(_read_ca(ca)), options)
        else:
            self._channel = grpc.insecure_channel(coordinator, options)
        self._under_way: set[Any] = set()
        self._fleet = fleet_pb2_grpc.FleetStub(self._channel)
        self._distribution = distribution_pb2_grpc.DistributionStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"), (INSTANCE, self._instance))

    def _call(self, method: Any, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        if isinstance(request, Message):  # a stream counts itself
            self._on_bytes(request.ByteSize())
        call = method.future(request, timeout=timeout_s, metadata=self._metadata())
        with self._tracked(call):
            reply = call.result()
        self._on_bytes(reply.ByteSize())
        return reply

    @contextmanager
    def _tracked(self, call: Any) -> Iterator[None]:
        """A call that `cancel` can end, its errors as ours."""
        self._under_way.add(call)
        try:
            yield
        except grpc.FutureCancelledError:
            raise Cancelled("the call was ended, since the device stops") from None
        except grpc.RpcError as error:
            raise self._explain(error) from None
        finally:
            self._under_way.discard(call)

    def cancel(self) -> None:
        """End all calls under way, from any thread; they raise `Cancelled`."""
        for call in list(self._under_way):
            call.cancel()

    def _explain(self, error: Any) -> LinkError:
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.CANCELLED:
            return Cancelled(f"the call was ended ({details[:200]})")
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            log.debug("%s: %s", self.coordinator, details)
            if any(sign in details for sign in HANDSHAKE_FAILED):
                return Unreachable(
                    f"{self.coordinator} does not prove that it is the coordinator ({_tls_reason(details)}); is this the address "
                    "that its certificate names, and `ca` the file that came with it?"
                )
            if code == grpc.StatusCode.UNAVAILABLE and details.startswith("the coordinator"):
                return Unreachable(f"{self.coordinator}: {details[:200]}")
            return Unreachable(
                f"the coordinator at {self.coordinator} cannot be reached; is it running, and is the address right?"
            )
        again = dict(error.trailing_metadata() or ()).get(RETRY_AFTER)
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED and again is not None:
            return Busy(f"the coordinator at {self.coordinator} is busy: {details[:200]}")
        return Refused(code.name, f"the coordinator at {self.coordinator} refused: {details[:500] or code.name}")

    # ---- the fleet -------------------------------------------------------------------------------------------------------

    def enrol(self, name: str, channel: str, token: str, enrolment_key: str = "") -> None:
        """Make the device known by a token of its own, which goes with all calls from now on."""
        request = fleet.EnrolRequest(
            name=name,
            channel=channel,
            protocol=PROTOCOL,
            sdk_version=SDK_VERSION,
            token=token,
            enrolment_key=enrolment_key,
        )
        self._call(self._fleet.Enrol, request)
        self.token = token

    def begin_check_in(self, examples: int, release_id: int, wait_s: float, **told: Any) -> Any:
        """A long poll under way: to be ended with `end_check_in`. told: other fields of the request."""
        request = fleet.CheckInRequest(
            protocol=PROTOCOL, sdk_version=SDK_VERSION, examples=examples, wait_s=wait_s, release_id=release_id, **told
        )
        self._on_bytes(request.ByteSize())
        return self._fleet.CheckIn.future(request, timeout=wait_s + CALL_TIMEOUT_S, metadata=self._metadata())

    def end_check_in(self, call: Any) -> fleet.CheckInReply:
        """Its reply.

        Raises:
            LinkError: unreachable, refused or cancelled.
        """
        with self._tracked(call):
            reply = call.result()
        self._on_bytes(reply.ByteSize())
        return reply  # type: ignore[no-any-return]

    def heartbeat(self, assignment_id: str, phase: fleet.HeartbeatRequest.Phase, progress: float) -> bool:
        """False: stop, the assignment has ended."""
        request = fleet.HeartbeatRequest(assignment_id=assignment_id, phase=phase, progress=progress)
        return not self._call(self._fleet.Heartbeat, request, 10.0).cancelled

    def decline(self, assignment_id: str, reason: str) -> None:
        """Give an assignment back. `cancel` leaves this call alone: it is how a device that stops takes its leave."""
        request = fleet.DeclineRequest(assignment_id=assignment_id, reason=reason[:500])
        try:
            self._fleet.Decline(request, timeout=DECLINE_TIMEOUT_S, metadata=self._metadata())
        except grpc.RpcError as error:
            raise self._explain(error) from None

    def upload(
        self,
        assignment_id: str,
        data: bytes,
        digest: str,
        num_examples: int,
        metrics: Mapping[str, float],
        go_on: Callable[[], bool] = lambda: True,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> fleet.Receipt:
        """Hand in an update, from where an earlier try ended.

        Args:
            go_on: asked before every part.
            progress: told the fraction sent.

        Raises:
            Paused: go_on said no; what has arrived stays there.
        """
        status = self._call(self._fleet.GetUploadStatus, fleet.UploadStatusRequest(assignment_id=assignment_id))
        if status.HasField("receipt"):
            return status.receipt  # type: ignore[no-any-return]
        header = fleet.UploadHeader(
            assignment_id=assignment_id,
            total_bytes=len(data),
            digest=digest,
            offset=status.received_bytes,
            num_examples=num_examples,
            metrics=metrics,
        )

        paused = threading.Event()

        def parts() -> Iterator[fleet.UploadPart]:
            yield fleet.UploadPart(header=header)
            for start in range(header.offset, len(data), UPLOAD_BYTES):
                if not go_on():  # the stream ends in good order, so that what has arrived is kept there
                    paused.set()
                    return
                part = data[start : start + UPLOAD_BYTES]
                self._on_bytes(len(part))
                progress(start / len(data))
                yield fleet.UploadPart(data=part)

        try:
            return self._call(self._fleet.Upload, parts(), TRANSFER_TIMEOUT_S)  # type: ignore[no-any-return]
        except Refused:
            if paused.is_set():
                raise Paused("the upload was interrupted; it goes on where it was") from None
            raise

    # ---- artifacts: this is an `artifacts.Source` ----------------------------------------------------------------------------

    def describe(self, version: str) -> distribution.GetManifestReply:
        """The manifest and what its publisher says of it."""
        return self._call(self._distribution.GetManifest, distribution.GetManifestRequest(version=version))  # type: ignore[no-any-return]

    def manifest(self, version: str) -> bytes:
        return bytes(self.describe(version).manifest)

    def latest(self, channel: str) -> distribution.GetManifestReply:
        return self._call(self._distribution.GetManifest, distribution.GetManifestRequest(channel=channel))  # type: ignore[no-any-return]

    def download(self, digest: str, first_chunk: int = 0) -> Iterator[bytes]:
        request = distribution.DownloadRequest(digest=digest, first_chunk=first_chunk)
        call = self._distribution.Download(request, timeout=TRANSFER_TIMEOUT_S, metadata=self._metadata())
        try:
            with self._tracked(call):
                for chunk in call:
                    self._on_bytes(len(chunk.data))
                    yield chunk.data
        finally:
            call.cancel()  # whoever stops reading must not leave the coordinator sending


class Unreachable(LinkError):  # noqa: N818 - says what it is
    """Nobody answers; trying again later may help."""


class Busy(Unreachable):
    """Too many calls at once; trying again later helps."""


class Cancelled(LinkError):  # noqa: N818
    """Ended by `Link.cancel`, or by a coordinator that stops."""


class Paused(LinkError):  # noqa: N818
    """A transfer that was interrupted here, in good order."""


class Refused(LinkError):  # noqa: N818
    """The coordinator answered with an error. `code` is the gRPC status code's name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

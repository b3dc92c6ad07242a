"""TLS for the coordinator: a certificate authority for a first fleet, and credentials that follow the files on disk."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import grpc

CA_FILE, CA_KEY, CERTIFICATE_FILE, KEY_FILE = "ca.pem", "ca.key", "server.pem", "server.key"
CA_DAYS, SERVER_DAYS = 3650, 397
SKEW_DAYS = 2  # certificates are valid from so long before they were made: a device's clock may be a day behind


class TlsError(RuntimeError):
    """Certificates that cannot be made, read or used."""


@dataclass(frozen=True)
class Tls:
    """PEM files: the server's certificate (with any between it and the CA) and its key."""

    certificate: Path
    key: Path


def is_loopback(host: str) -> bool:
    """
    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("0.0.0.0"), is_loopback("[::]")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def make_certificates(folder: Path, hosts: Sequence[str], days: int = SERVER_DAYS) -> Tls:
    """A server certificate for the names and addresses, by the CA in `folder`, which is made if there is none.

    Devices need `ca.pem` and nothing else; `ca.key` can be taken off the machine until the next certificate is due.

    Raises:
        TlsError: no host, or a CA without its key.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if not hosts:
        raise TlsError("a certificate needs the names or addresses that devices connect to; give --host")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, authority_key = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    begin = datetime.now(UTC) - timedelta(days=SKEW_DAYS)
    end = min(begin + timedelta(days=days + SKEW_DAYS), authority.not_valid_after_utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pocketfed coordinator")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write_key(folder / KEY_FILE, key)
    _write(folder / CERTIFICATE_FILE, _pem(certificate))
    return Tls(folder / CERTIFICATE_FILE, folder / KEY_FILE)


def _authority(folder: Path) -> tuple[Any, Any]:
    """The CA's certificate and key, made if there is neither."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    if (folder / CA_FILE).exists():
        try:
            authority = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
            return authority, serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise TlsError(
                f"{folder} has a {CA_FILE} but no usable {CA_KEY} ({error}); put the key back, or give another folder"
            ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pocketfed fleet CA")])
    begin = datetime.now(UTC) - timedelta(days=SKEW_DAYS)
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False
    ) | {"key_cert_sign": True, "crl_sign": True}  # fmt: skip
    authority = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_key(folder / CA_KEY, key)
    _write(folder / CA_FILE, _pem(authority))
    return authority, key


def _name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise TlsError(f"{host!r} is neither a name in ASCII nor an IP address; give --host as devices do") from None


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return bytes(certificate.public_bytes(Encoding.PEM))


def _write_key(path: Path, key: Any) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and a secret from its first byte on: nobody else may read it."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    mode = 0o644 if path.suffix == ".pem" else 0o600
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def find_tls(folder: Path) -> Tls | None:
    """The server's certificate and key in a folder of `make_certificates`, if they are there."""
    tls = Tls(folder / CERTIFICATE_FILE, folder / KEY_FILE)
    return tls if tls.certificate.is_file() and tls.key.is_file() else None


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials that are read again when the files change: a renewed certificate needs no restart.

    Raises:
        TlsError: unreadable, or a certificate and a key that do not belong together.
    """
    read_at = _stamp(tls)
    configuration = _configuration(tls)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal read_at
        with contextlib.suppress(TlsError):  # half replaced: the old one holds until both files fit
            stamp = _stamp(tls)
            if stamp != read_at:
                read_at, renewed = stamp, _configuration(tls)
                return renewed
        return None

    return grpc.dynamic_ssl_server_credentials(configuration, cast(Any, fetch), require_client_authentication=False)


def _stamp(tls: Tls) -> tuple[int, int]:
    try:
        return tls.certificate.stat().st_mtime_ns, tls.key.stat().st_mtime_ns
    except OSError as error:
        raise TlsError(
            f"cannot read {error.filename}: {error.strerror}; make certificates with `pocketfed certs`"
        ) from None


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        chain, key = tls.certificate.read_bytes(), tls.key.read_bytes()
        fits = x509.load_pem_x509_certificate(chain).public_key() == load_pem_private_key(key, None).public_key()
    except (OSError, ValueError, TypeError) as error:
        raise TlsError(f"cannot use {tls.certificate} with {tls.key}: {error}; give PEM files") from None
    if not fits:
        raise TlsError(f"{tls.key} is not the key of {tls.certificate}; give the two that were made together")
    return grpc.ssl_server_certificate_configuration([(key, chain)])

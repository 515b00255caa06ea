"""Who a node is: a certificate authority of the federation's own, and one certificate for each node.

A node's folder holds `ca.crt`, `node.crt` and `node.key`. The common name of `node.crt` is the node's id, and that is
what neighbours believe; addresses in it are for people. The authority's key signs and is needed nowhere else.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from colledge.errors import ConfigError
from colledge.federation.transport import NodeId
from colledge.records import write_atomically

AUTHORITY_CERTIFICATE = "ca.crt"
NODE_CERTIFICATE = "node.crt"
NODE_KEY = "node.key"
_AUTHORITY_KEY = "ca.key"
_SECRET = 0o600
_CLOCKS_DIFFER = timedelta(hours=1)  # a node whose clock is late must not find its certificate not yet valid
_NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def make_authority(folder: Path, valid_days: float = 3650.0, now: datetime | None = None) -> None:
    """Make a certificate authority: `ca.crt`, which every node gets, and `ca.key`, which stays here.

    Raises:
        ConfigError: There is one already; its nodes would not know the new one.
    """
    if (folder / _AUTHORITY_KEY).exists():
        raise ConfigError(
            f"{folder}: there is an authority already.", fix="give another folder, or remove that one."
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("colledge federation")
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _unsigned(name, name, key.public_key(), valid_days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_key(folder / _AUTHORITY_KEY, key)
    _write_certificate(folder / AUTHORITY_CERTIFICATE, certificate)


def issue(
    authority: Path,
    node_id: NodeId,
    hosts: list[str],
    folder: Path,
    valid_days: float = 365.0,
    now: datetime | None = None,
) -> None:
    """Make a node's key and certificate, and put all that the node needs into a folder.

    Args:
        authority: The folder of `make_authority`.
        node_id: The certificate's common name.
        hosts: Names and addresses under which others reach the node; may be empty for one that nobody connects to.
        folder: Where `ca.crt`, `node.crt` and `node.key` are written; what was there is replaced.
        valid_days: From now on.
        now: The time, in tests.

    Raises:
        ConfigError: There is no authority, or the id is none.
    """
    if not _NODE_ID.fullmatch(node_id):
        raise ConfigError(
            f"node id {node_id!r}, wanted letters, digits, '.', '_' and '-', 64 at most.",
            fix="rename the node.",
        )
    signer = _read_certificate(authority / AUTHORITY_CERTIFICATE)
    signer_key = _read_key(authority / _AUTHORITY_KEY)
    key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _unsigned(_name(node_id), signer.subject, key.public_key(), valid_days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()),
            critical=False,
        )
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(_alternatives(hosts)), critical=False)
    _write_key(folder / NODE_KEY, key)
    _write_certificate(folder / AUTHORITY_CERTIFICATE, signer)
    _write_certificate(folder / NODE_CERTIFICATE, builder.sign(signer_key, hashes.SHA256()))


def check(folder: Path, node_id: NodeId, now: datetime | None = None) -> None:
    """Check that a node's folder proves who the node is, before a neighbour refuses it without a word.

    Raises:
        ConfigError: A file is missing or malformed, the key is readable by others, or the certificate is of another
            authority, another key, another node or another time.
    """
    signer = _read_certificate(folder / AUTHORITY_CERTIFICATE)
    certificate = _read_certificate(folder / NODE_CERTIFICATE)
    key = _read_key(folder / NODE_KEY)
    path, again = (
        folder / NODE_CERTIFICATE,
        f"where the authority is, remove the folder {node_id!r} and provision again.",
    )
    try:
        certificate.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(f"{path}: not signed by {AUTHORITY_CERTIFICATE} beside it.", fix=again) from None
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{path}: {NODE_KEY} beside it belongs to another certificate.", fix=again)
    if (name := common_name(certificate)) != node_id:
        raise ConfigError(f"{path}: of node {name!r}, wanted {node_id!r}.", fix=again)
    moment = now or datetime.now(timezone.utc)
    for one, file in ((certificate, path), (signer, folder / AUTHORITY_CERTIFICATE)):
        if moment > one.not_valid_after_utc:
            raise ConfigError(f"{file}: expired on {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC.", fix=again)
        if moment < one.not_valid_before_utc:
            raise ConfigError(
                f"{file}: not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and it is "
                f"{moment:%Y-%m-%d %H:%M}.",
                fix="set this device's clock.",
            )


def common_name(certificate: x509.Certificate) -> str:
    """Return whose certificate it is; "" where it does not say."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _unsigned(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    valid_days: float,
    now: datetime | None,
) -> x509.CertificateBuilder:
    start = now or datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _CLOCKS_DIFFER)
        .not_valid_after(start + timedelta(days=valid_days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(
    digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(hosts: list[str]) -> list[x509.GeneralName]:
    """Return hosts as alternative names; one that is this machine itself stands for all that are."""
    names = dict.fromkeys(hosts)
    if any(host == "localhost" or host.startswith("127.") for host in hosts):
        names |= dict.fromkeys(("localhost", "127.0.0.1"))
    return [_general_name(host) for host in names]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(path, text, _SECRET)


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    write_atomically(path, certificate.public_bytes(serialization.Encoding.PEM))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise ConfigError(
            f"{path}: cannot be read ({fault.strerror}).",
            fix="put a node's ca.crt, node.crt and node.key there.",
        ) from None


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError:
        raise ConfigError(f"{path}: not a certificate in PEM.", fix="issue it again.") from None


def _read_key(path: Path) -> CertificateIssuerPrivateKeyTypes:
    text = _read(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"{path}: others may read it (mode {mode:o}).", fix=f"chmod 600 {path}")
    try:
        return serialization.load_pem_private_key(text, None)  # type: ignore[return-value]
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: not an unencrypted private key in PEM.", fix="issue it again.") from None

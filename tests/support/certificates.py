"""Certificates made for a test, and TLS servers that have them."""

import datetime as dt
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = dt.timedelta(days=1)


class Party:
    """Somebody with a key and a certificate: a CA, or a server at 127.0.0.1 and under `names`."""

    def __init__(
        self,
        name: str,
        issuer: "Party | None" = None,
        *,
        ca: bool = False,
        names: Sequence[str] = ("127.0.0.1",),
        starts: float = -1,
        ends: float = 1,
        extended: bool = True,
    ) -> None:
        now = dt.datetime.now(dt.UTC)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signer = issuer or self
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(signer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + starts * DAY)
            .not_valid_after(now + ends * DAY)
        )
        if extended:
            builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if not ca:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(list(map(_name, names))), critical=False
            )
        self.certificate = builder.sign(signer.key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def file(self, directory: Path) -> Path:
        """Write the certificate for those who are to trust it."""
        path = directory / f"{self.certificate.serial_number}.crt"
        path.write_bytes(self.pem)
        return path

    def server(self, directory: Path, *between: "Party") -> ssl.SSLContext:
        """Give what a server needs that is this party and sends the certificates `between` along."""
        pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key = self.key.private_bytes(serialization.Encoding.PEM, pkcs8, plain)
        path = directory / f"{self.certificate.serial_number}.pem"
        path.write_bytes(key + self.pem + b"".join(one.pem for one in between))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)

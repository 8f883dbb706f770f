"""Authenticates callers of the double, by JSON web tokens and API keys, as the AITBC coordinator does."""

import base64
import hashlib
import hmac
import json
import time
from dataclasses import dataclass
from email.message import Message
from typing import Any

from tools.mock.http import Refusal


@dataclass(frozen=True)
class Gate:
    """The API keys of miners, and the secret for tokens."""

    keys: tuple[str, ...]
    secret: str

    def token(self, sub: str, role: str, ttl_s: float) -> str:
        """Return a token that is valid for `ttl_s` seconds."""
        claims = {"sub": sub, "role": role, "exp": time.time() + ttl_s}
        parts = [_text(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
        return ".".join([*parts, self._signature(".".join(parts))])

    def caller(self, bearer: str | None, headers: Message, role: str | None) -> str:
        """Return the caller, by the token if the request has a token. A key does not prove a miner's name.

        Raises:
            Refusal: 401, the caller is unknown; 403, the caller does not have `role`.
        """
        key = headers.get("X-Api-Key")
        if bearer is not None:
            claims = self._claims(bearer)
            name, has = claims.get("sub"), claims.get("role")
        elif key is None:
            raise Refusal(401, "auth", "Authentication required", WWW_Authenticate="Bearer")
        elif key in self.keys:
            name, has = headers.get("X-Miner-ID") or key, "miner"
        else:
            raise Refusal(401, "auth", "Invalid API key")
        if has != role:
            raise Refusal(403, "auth", "Forbidden")
        return str(name)

    def _claims(self, token: str) -> dict[str, Any]:
        signed, _, signature = token.rpartition(".")
        good = hmac.compare_digest(self._signature(signed).encode(), signature.encode())
        try:
            head, claims = (_object(part) for part in signed.split("."))
            good &= head["alg"] == "HS256" and bool(claims["sub"]) and claims["exp"] > time.time()
        except (ValueError, TypeError, LookupError):
            good = False
        if not good:
            raise Refusal(401, "auth", "Invalid token")
        return claims

    def _signature(self, signed: str) -> str:
        return _text(hmac.digest(self.secret.encode(), signed.encode(), hashlib.sha256))


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _object(part: str) -> dict[str, Any]:
    value = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    if not isinstance(value, dict):
        raise ValueError("no object")  # noqa: TRY004  a bad value in a token
    return value

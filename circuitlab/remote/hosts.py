"""Hosts: where jobs are sent, and the key that goes with them and nowhere else."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import urlsplit

import httpx
import nnsight

from circuitlab.errors import OptionError
from circuitlab.labels import excerpt

#: Where jobs go when no host is named.
NDIF = "https://api.ndif.us"


class Key:
    """An API key. It shows itself to nobody; :meth:`headers` is the one way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value.strip()
        if not (self._value.isascii() and self._value.isprintable()) or " " in self._value:
            raise OptionError(
                "the API key holds characters that no key has; set NDIF_API_KEY again"
            )

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Key(***)" if self else "Key()"

    def __reduce__(self) -> tuple[type[Key], tuple[()]]:
        return Key, ()

    def headers(self) -> dict[str, str]:
        """The header that carries it."""
        return {"ndif-api-key": self._value} if self else {}

    def scrub(self, text: str) -> str:
        """A text without the key: hosts repeat what they were sent."""
        return text.replace(self._value, "***") if self else text


@dataclass(frozen=True, slots=True)
class Host:
    """A server that speaks NDIF's protocol.

    Attributes:
        url: ``https://…``, or ``http://`` of this machine.
        key: Sent to it with each job.
    """

    url: str
    key: Key = field(default_factory=Key)

    @property
    def known(self) -> bool:
        """Whether it is NDIF itself, or on this machine."""
        return self.url == NDIF or on_this_machine(self.url)


def find_host(remote: str | bool) -> Host:
    """The host that someone means.

    Args:
        remote: True for nnsight's own setting (``NDIF_HOST``, else NDIF), or an address.

    Raises:
        OptionError: the address is not one of https, nor of this machine.
    """
    url = remote if isinstance(remote, str) else os.environ.get("NDIF_HOST", "")
    url = (url or nnsight.CONFIG.API.HOST or NDIF).rstrip("/")
    check_address(url)
    key = os.environ.get("NDIF_API_KEY") or nnsight.CONFIG.API.APIKEY or ""
    return Host(url, Key(key))


def check_address(url: str) -> None:
    """Refuse an address that others could read along, or answer in the name of.

    Raises:
        OptionError: it is not one of https, nor of this machine, or it holds a password.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise OptionError(f"remote host '{excerpt(url)}' is no address; give https://…") from None
    shown = excerpt(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OptionError(f"remote host '{shown}' is no address; give https://… or leave it out")
    if parts.username or parts.password:
        raise OptionError(f"remote host '{shown}' was given with a password; set NDIF_API_KEY")
    if parts.scheme == "http" and not on_this_machine(url):
        raise OptionError(
            f"remote host '{shown}' is not https: whoever is on the way could read the key and "
            f"answer in its name; give an https address, or one of this machine"
        )


@cache
def _trusted(trust_env: bool) -> ssl.SSLContext:
    """Certificates that are believed; reading them takes longer than many an answer."""
    return httpx.create_ssl_context(trust_env=trust_env)


def connected(url: str, timeout: httpx.Timeout | float) -> httpx.Client:
    """A client for an address; one on this machine is not asked through a proxy."""
    elsewhere = not on_this_machine(url)
    return httpx.Client(timeout=timeout, trust_env=elsewhere, verify=_trusted(elsewhere))


def on_this_machine(url: str) -> bool:
    """Whether an address is of this machine."""
    name = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"

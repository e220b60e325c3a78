"""Refusals: what a host says when it will not do something, in words that help."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version

import httpx

from circuitlab.errors import RemoteError
from circuitlab.labels import excerpt
from circuitlab.remote.hosts import Host, connected

_NOT_HOSTED = re.compile(
    r"not (deployed|hosted|running|available|found)|unavailable|could not deploy|unknown model",
    re.IGNORECASE,
)
#: What torch says of tensors that were handed from another process, and of weights that are not
#: there.
_ELSEWHERE = ("does not require grad", "meta tensor", "on meta")


def detail(reply: httpx.Response) -> str:
    """What a reply that is no success says."""
    try:
        body = reply.json()
    except ValueError:
        return reply.text or reply.reason_phrase
    return str(body.get("detail", body) if isinstance(body, dict) else body)


def said(host: Host, text: str) -> str:
    """A host's words in one line and without the key."""
    return excerpt(" ".join(host.key.scrub(text).split()), 300)


def refused(host: Host, model_key: str, code: int, text: str) -> RemoteError:
    """The error of a request that the host did not take.

    Args:
        host: The host.
        model_key: What the host was asked to run.
        code: Of HTTP.
        text: The host's reason.
    """
    words = said(host, text)
    if code in (401, 403) or re.search(r"api.?key", text, re.IGNORECASE):
        has = "refused the API key" if host.key else "wants an API key, and none is set"
        return RemoteError(f"host {host.url} {has} ({words}); set NDIF_API_KEY to one of that host")
    if re.search(r"\bversion\b", text, re.IGNORECASE):
        return RemoteError(
            f"host {host.url} runs another version: here nnsight {version('nnsight')} on Python "
            f"{sys.version.split()[0]}, there {_versions(host)} ({words}); install what the host "
            f"asks for"
        )
    if _NOT_HOSTED.search(text):
        return _not_hosted(host, model_key, words)
    return RemoteError(f"host {host.url} refused the job (HTTP {code}): {words}")


def failed(host: Host, model_key: str, job: str, text: str) -> RemoteError:
    """The error of a job that ended in one; the last line of a traceback says which."""
    lines = text.strip().splitlines() or ["no reason given"]
    last = said(host, lines[-1])
    if any(sign in text for sign in _ELSEWHERE):
        return RemoteError(
            f"job {job} failed on {host.url}: {last}; gradients and weights need code that runs "
            f"beside the model, which this host does not allow this key (see docs/remote.md)"
        )
    if len(lines) == 1 and _NOT_HOSTED.search(text):
        return _not_hosted(host, model_key, last)
    return RemoteError(f"job {job} failed on {host.url}: {last}")


def _not_hosted(host: Host, model_key: str, words: str) -> RemoteError:
    return RemoteError(
        f"host {host.url} does not have model {model_key}: {words}; see what it has at "
        f"{host.url}/status, or say what it calls the model with --remote-key"
    )


def _versions(host: Host) -> str:
    """What the host runs, if it says so."""
    try:
        with connected(host.url, 10.0) as client:
            found = client.get(f"{host.url}/env").json()
        python = str(found["python_version"]).split()[0]
        return excerpt(f"nnsight {found['packages']['nnsight']} on Python {python}", 80)
    except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError):
        return "what it does not say"

"""Client: one job at a time, from its submission to its result, whatever happens on the way."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from circuitlab.errors import OptionError, RemoteError
from circuitlab.labels import excerpt
from circuitlab.progress import report, tell
from circuitlab.remote.hosts import Host, check_address, connected, find_host
from circuitlab.remote.job_log import JobLog
from circuitlab.remote.refusals import detail, failed, refused, said
from circuitlab.remote.replies import read_result, read_status

#: Seconds to the second try of a request that failed; doubled for each further one.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
#: Tries of a host that has never answered.
TRIES = 5
#: Seconds between two looks at a job, at first and at most.
FIRST_LOOK = 0.05
LONGEST_LOOK = 5.0
#: Seconds for which a host may not know a job it has taken.
UNKNOWN_FOR = 120.0
#: Times that work is sent again after its job was lost.
SENT_AGAIN = 2
#: Bytes of work that is told of before it is sent.
LARGE = 10**7
#: Seconds of waiting after which it is told how a job stands.
QUIET = 2.0

_PASSING = {429, 500, 502, 503, 504}
#: Seconds for a connection, and for an answer at most.
CONNECT = 10.0
ANSWER = 600.0


def remote_client(
    remote: bool | str, model: str | None, timeout: float, log: str | Path | None
) -> Client:
    """The way to the host that someone means, see :func:`circuitlab.load_model`.

    Raises:
        OptionError: the address is not safe, or there is no time.
    """
    if not timeout > 0:
        raise OptionError(f"--timeout {timeout:g} leaves no time; give seconds above 0")
    host = find_host(remote)
    if not host.known:
        tell([f"prompts, activations and the API key go to {host.url}, which is not NDIF"])
    return Client(host, model or "", timeout, JobLog(log))


@dataclass
class Client:
    """Sends work to a host and brings back results.

    Attributes:
        host: Where.
        model_key: What the host calls the model.
        timeout: Seconds that one job may take, waiting included.
        log: Where job ids are written down.
        jobs: Jobs sent or taken up so far.
    """

    host: Host
    model_key: str
    timeout: float = 3600.0
    log: JobLog = field(default_factory=JobLog)
    jobs: int = 0
    _answered: bool = False

    def name_model(
        self,
        name: str,
        folder: bool,
        revision: str | None,
        trust_remote_code: bool,
        *,
        ask_hub: bool,
    ) -> None:
        """Settle what the host calls the model, where that was not said whole.

        Args:
            name: Folder or hub id that the configuration is from.
            folder: Which of the two.
            revision: Of the repository.
            trust_remote_code: Whether its own code runs.
            ask_hub: Whether to ask the hub how it spells the id.

        Raises:
            OptionError: the model is a folder, and no name was given.
        """
        if self.model_key.startswith("nnsight."):
            return
        if folder and not self.model_key:
            raise OptionError(
                f"no host knows a model by the name of a folder ({excerpt(name)}); say what it is "
                f"called there with --remote-key"
            )
        repository = self.model_key or (_canonical(name) if ask_hub else name)
        parts: dict[str, Any] = {"repo_id": repository, "revision": revision}
        if trust_remote_code:
            parts["trust_remote_code"] = True
        parts["task"] = "text-generation"
        self.model_key = f"nnsight.modeling.transformers.TransformersModel:{json.dumps(parts)}"

    def run(self, envelope: str, blob: bytes, digest: str, what: str) -> Any:
        """What a job saved.

        Args:
            envelope: Routing, as JSON.
            blob: The work.
            digest: Of the work: a job in the log that does the same is taken up.
            what: The work in words, for people.

        Raises:
            RemoteError: the host refuses or fails, or the time is over.
        """
        end = time.monotonic() + self.timeout
        self.jobs += 1
        job = self.log.find(digest, self.host.url)
        taken_up = job is not None
        for _ in range(1 + SENT_AGAIN + taken_up):
            if job is None:
                if len(blob) > LARGE:
                    report(f"{self.host.url}: sending {what}")
                job = self._submit(envelope, blob, end)
                self.log.add(digest, job, self.host.url)
            content = self._await(job, end, taken_up)
            if content is not None:
                return read_result(content, compressed=True)
            job, taken_up = None, False
        raise RemoteError(
            f"host {self.host.url} lost the same job {1 + SENT_AGAIN} times; try again later"
        )

    def _submit(self, envelope: str, blob: bytes, end: float) -> str:
        headers = {
            **self.host.key.headers(),
            "nnsight-version": version("nnsight"),
            "python-version": sys.version,
            "ndif-timestamp": repr(time.time()),
        }
        reply = self._ask(
            "POST",
            f"{self.host.url}/request",
            end,
            headers=headers,
            data={"data": envelope},
            files={"blob": ("request", blob, "application/octet-stream")},
        )
        if reply.status_code != 200:
            raise refused(self.host, self.model_key, reply.status_code, detail(reply))
        status = read_status(reply.content)
        job = status.get("id", "")
        if status.get("status") == "ERROR" or not re.fullmatch(r"[\w.:-]{1,200}", job):
            words = status.get("description", "it gave the job no id")
            raise refused(self.host, self.model_key, 200, words)
        return job

    def _await(self, job: str, end: float, taken_up: bool) -> bytes | None:
        """The result; None where the host does not know the job, or keeps its result no more."""
        began, pause, seen = time.monotonic(), FIRST_LOOK, not taken_up
        heard = began
        while True:
            reply = self._ask("GET", f"{self.host.url}/response/{job}", end)
            now = time.monotonic()
            if reply.status_code == 404:
                if not seen or now - heard > UNKNOWN_FOR:
                    return None
                stands = "not known to the host yet"
            else:
                status = self._status(reply)
                seen, heard = True, now
                if status.get("status") == "COMPLETED":
                    return self._fetch(status.get("data", ""), end)
                if status.get("status") == "ERROR" and taken_up:
                    return None
                if status.get("status") == "ERROR":
                    words = status.get("description", "")
                    raise failed(self.host, self.model_key, job, words)
                stands = said(self.host, f"{status.get('status')} {status.get('description', '')}")
            if now - began > QUIET:
                report(f"{self.host.url}: {stands}")
            if now + pause > end:
                raise self._late(f"job {job} is not done: {stands}")
            time.sleep(pause)
            pause = min(LONGEST_LOOK, 1.5 * pause)

    def _status(self, reply: httpx.Response) -> dict[str, str]:
        if reply.status_code != 200:
            raise refused(self.host, self.model_key, reply.status_code, detail(reply))
        return read_status(reply.content)

    def _fetch(self, address: str, end: float) -> bytes | None:
        """A result from where the host says it is; None where it is there no more."""
        try:
            check_address(address)
        except OptionError as error:
            raise RemoteError(f"the host's result cannot be fetched: {error}") from None
        # Without the key: results lie elsewhere.
        reply = self._ask("GET", address, end)
        if reply.status_code in (403, 404, 410):
            return None
        if reply.status_code != 200:
            raise refused(self.host, self.model_key, reply.status_code, detail(reply))
        return reply.content

    def _ask(self, method: str, url: str, end: float, **how: Any) -> httpx.Response:
        """A reply that is no passing failure, tried for until the time is over.

        Raises:
            RemoteError: there was none in time, or the host never answered.
        """
        pause = FIRST_PAUSE
        for tried in range(1, 10_000):
            left = max(1.0, end - time.monotonic())
            times = httpx.Timeout(CONNECT, read=min(ANSWER, left))
            try:
                with connected(url, times) as client:
                    reply = client.request(method, url, **how)
                self._answered = True
                if reply.status_code not in _PASSING:
                    return reply
                fact = f"answers {reply.status_code}: {detail(reply)}"
            except (httpx.RequestError, httpx.InvalidURL) as error:
                fact = f"cannot be reached: {type(error).__name__} {error}"
            fact = said(self.host, fact)
            if not self._answered and tried >= TRIES:
                raise RemoteError(
                    f"host {self.host.url} {fact}; check the address and the network"
                ) from None
            # Jittered, so that those whom a host dropped do not all come back at once.
            wait = pause * random.uniform(0.5, 1.0)  # noqa: S311  (no secret)
            if time.monotonic() + wait > end:
                raise self._late(fact)
            report(f"host {self.host.url} {fact}; trying again")
            time.sleep(wait)
            pause = min(LONGEST_PAUSE, 2 * pause)
        raise AssertionError("unreachable")

    def _late(self, fact: str) -> RemoteError:
        kept = "the same command takes it up again" if self.log.path else "keep jobs with --resume"
        return RemoteError(
            f"host {self.host.url}: {fact} after {self.timeout:g} s; {kept}, or allow more time "
            f"with --timeout"
        )


def _canonical(name: str) -> str:
    """A repository's name in the hub's own spelling; as it was given where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(name, timeout=10.0).id)
    except Exception:  # noqa: BLE001  (gated, gone, offline: the host will say)
        return name

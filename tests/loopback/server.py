"""A loopback NDIF: speaks the protocol of nnsight 0.8 on 127.0.0.1 and executes what it is sent.

Run in a process of its own: ``python server.py MODELS.json`` with ``{model key: folder}``; it
prints its port. POST /tell sets how it behaves from then on, GET /log says what it was sent. It
runs whatever code arrives: it listens on this machine alone, and only tests may start it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.abc
import io
import json
import os
import socket
import struct
import sys
import threading
import traceback
import uuid
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

#: How it behaves; a number is how many requests more.
BEHAVIOUR: dict[str, Any] = {
    "key": "",  # the only key that is let in; any where empty
    "least_version": "",  # of nnsight
    "other_version": "",  # what it says it runs
    "fail": 0,  # answers 503
    "drop": 0,  # closes the connection without an answer
    "drop_after": 0,  # takes the job, and closes the connection without an answer
    "stall": 0,  # looks at a job during which it stays queued
    "lose": 0,  # jobs it forgets
    "hostile": "",  # a file that its replies try to create on the machine that reads them
    "result_url": "",  # where it says results are
    "untrusted": False,  # code runs where the weights are not
    "no_results": 0,  # results that are gone when they are fetched
}


class NoCircuitLab(importlib.abc.MetaPathFinder):
    """A host does not have CircuitLab, even where this process could import it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0].startswith("circuitlab"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoCircuitLab())


class Attack:
    """Unpickled as it was meant to be, it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


class Jobs:
    """Models, jobs and their results; one job is executed at a time."""

    def __init__(self, folders: dict[str, str]) -> None:
        self.folders = folders
        self.models: dict[str, Any] = {}
        self.status: dict[str, dict[str, Any]] = {}
        self.results: dict[str, bytes] = {}
        self.stalled: dict[str, int] = {}
        self.sessions: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def model(self, key: str) -> Any:
        if key not in self.models:
            from nnsight import TransformersModel
            from tokenizers import Tokenizer, models
            from transformers import PreTrainedTokenizerFast

            words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
            self.models[key] = TransformersModel(
                self.folders[key],
                task="text-generation",
                tokenizer=PreTrainedTokenizerFast(
                    tokenizer_object=words, pad_token="a", eos_token="a"
                ),
                dispatch=True,
            )
        return self.models[key]

    def take(self, job: str, envelope: dict[str, Any], blob: bytes) -> None:
        """Execute a job and tell whoever waits for it."""
        self.tell(job, envelope, "QUEUED", "Your job is queued at position 1.")
        if envelope["model_key"] not in self.folders:
            reason = f"Could not deploy this model. {envelope['model_key']} is not available."
            return self.tell(job, envelope, "ERROR", reason)
        try:
            with self.lock:
                saved, printed = self.execute(envelope, blob)
        except BaseException as error:  # noqa: BLE001  (told to the client)
            shown = getattr(error, "__intervention_tb__", None) or error.__traceback__
            text = "".join(traceback.format_exception(type(error), error, shown))
            return self.tell(job, envelope, "ERROR", text)
        for line in printed.splitlines():
            self.tell(job, envelope, "LOG", line)
        self.results[job] = saved
        where = BEHAVIOUR["result_url"] or f"http://127.0.0.1:{PORT}/result/{job}"
        return self.tell(job, envelope, "COMPLETED", "Your job has been completed.", where)

    def execute(self, envelope: dict[str, Any], blob: bytes) -> tuple[bytes, str]:
        """What a job saves, as nnsight's own client reads it, and what it prints."""
        import torch
        import zstandard
        from nnsight.schema.request import RequestModel
        from nnsight.tracing.backend import Backend
        from nnsight.tracing.globals import BLOCKS, SOURCES
        from nnsight.tracing.tracer import _saves, dec, inc

        model = self.model(envelope["model_key"])
        model._remoteable_set_env(envelope["env"])
        SOURCES.clear()
        BLOCKS.clear()
        printed = io.StringIO()
        inc()
        try:
            known = model._remoteable_persistent_objects()
            if BEHAVIOUR["untrusted"]:
                weightless = {
                    name: part.to("meta") if name.startswith("Module:") else part
                    for name, part in known.items()
                }
                self.models.pop(envelope["model_key"])
                known = weightless
            tracer = RequestModel.deserialize(blob, known, envelope["compress"])
            tracer.backend = Backend()
            with contextlib.redirect_stdout(printed):
                tracer.execute(tracer.info.code)
            names = tracer.info.frame.f_locals
            saved: Any = {name: value for name, value in names.items() if id(value) in _saves()}
        finally:
            dec()
        if BEHAVIOUR["hostile"]:
            saved = {"results": [Attack(BEHAVIOUR["hostile"])]}
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        data = buffer.getvalue()
        return (zstandard.compress(data) if envelope["compress"] else data), printed.getvalue()

    def tell(
        self, job: str, envelope: dict[str, Any], status: str, text: str, data: str | None = None
    ) -> None:
        said = {"id": job, "status": status, "description": text, "data": data}
        if status != "LOG":
            self.status[job] = said
        send = self.sessions.get(envelope["session_id"])
        if send is not None:
            send(json.dumps(said))


class Handler(BaseHTTPRequestHandler):
    """The routes of NDIF's API that nnsight's client uses, and two for tests."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def dropped(self) -> bool:
        """Whether this request gets no proper answer."""
        for name in ("drop", "fail"):
            if BEHAVIOUR[name] > 0:
                BEHAVIOUR[name] -= 1
                if name == "fail":
                    self.answer(503, {"detail": "Service temporarily unavailable: reconnecting."})
                else:
                    self.hang_up()
                return True
        return False

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/tell":
            BEHAVIOUR.update(json.loads(content))
            if BEHAVIOUR.pop("release", False):
                JOBS.stalled = dict.fromkeys(JOBS.stalled, 0)
            return self.answer(200, BEHAVIOUR)
        if self.dropped():
            return None
        headers = {
            name.lower(): value
            for name, value in self.headers.items()
            if name.lower().startswith(("ndif", "nnsight", "python"))
        }
        if refusal := _refusal(headers):
            return self.answer(*refusal)
        kind = self.headers["Content-Type"].encode()
        parts = BytesParser().parsebytes(b"Content-Type: " + kind + b"\r\n\r\n" + content)
        fields = {
            part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True)
            for part in parts.get_payload()
        }
        envelope = json.loads(fields["data"])
        blob, job = fields["blob"], str(uuid.uuid4())
        JOBS.log.append({"job": job, "envelope": envelope, "headers": headers})
        JOBS.blobs[job] = blob
        received = {"id": job, "status": "RECEIVED", "description": "received", "data": None}
        JOBS.status[job] = received
        JOBS.stalled[job] = BEHAVIOUR["stall"]
        if BEHAVIOUR["lose"] > 0:
            BEHAVIOUR["lose"] -= 1
            del JOBS.status[job]
        else:
            threading.Thread(target=JOBS.take, args=(job, envelope, blob), daemon=True).start()
        if BEHAVIOUR["drop_after"] > 0:
            BEHAVIOUR["drop_after"] -= 1
            return self.hang_up()
        return self.answer(200, received)

    def do_GET(self) -> None:
        route, _, name = self.path.strip("/").partition("/")
        if route == "log":
            return self.answer(200, JOBS.log)
        if route == "blob":
            return self.answer(200, JOBS.blobs[name])
        if route == "ping":
            return self.answer(200, "pong")
        if route == "subscribe":
            return self.subscribe()
        if self.dropped():
            return None
        if route == "response":
            if name not in JOBS.status:
                return self.answer(404, {"detail": "unknown job"})
            if JOBS.stalled[name] > 0:
                JOBS.stalled[name] -= 1
                said = f"Your job is queued at position {JOBS.stalled[name] + 1}."
                return self.answer(200, {"id": name, "status": "QUEUED", "description": said})
            return self.answer(200, JOBS.status[name])
        if route == "result":
            if BEHAVIOUR["no_results"] > 0:
                BEHAVIOUR["no_results"] -= 1
                return self.answer(403, {"detail": "Request has expired"})
            return self.answer(200, JOBS.results[name])
        if route == "env":
            from importlib.metadata import version

            there = BEHAVIOUR["other_version"] or version("nnsight")
            return self.answer(200, {"python_version": sys.version, "packages": {"nnsight": there}})
        return self.answer(404, {"detail": f"no route {route}"})

    def subscribe(self) -> None:
        """Switch to a websocket, say the session's name, and forward what is told to it."""
        magic = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(magic.encode()).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        session = uuid.uuid4().hex
        writing = threading.Lock()

        def send(text: str) -> None:
            data = text.encode()
            size = len(data)
            head = bytes([0x81, size]) if size < 126 else struct.pack(">BBH", 0x81, 126, size)
            if size >= 2**16:
                head = struct.pack(">BBQ", 0x81, 127, size)
            with writing, contextlib.suppress(OSError):
                self.connection.sendall(head + data)

        JOBS.sessions[session] = send
        send(json.dumps({"session_id": session}))
        with contextlib.suppress(OSError):
            while self.connection.recv(4096):
                pass
        del JOBS.sessions[session]
        self.close_connection = True


def _refusal(headers: dict[str, str]) -> tuple[int, Any] | None:
    """A refusal at the door, in NDIF's own words."""
    from packaging.version import Version

    key = headers.get("ndif-api-key", "")
    if BEHAVIOUR["key"] and not key:
        return 401, {"detail": "Missing or invalid API key. Please visit https://login.ndif.us/"}
    if BEHAVIOUR["key"] and key != BEHAVIOUR["key"]:
        # NDIF repeats a key that is no UUID.
        return 400, {"detail": f"Invalid API key format: '{key}'. API keys must be UUIDs."}
    least, found = BEHAVIOUR["least_version"], headers.get("nnsight-version", "0")
    if least and Version(found) < Version(least):
        said = f"Client nnsight version {found} is below the minimum supported {least}."
        return 400, {"detail": said}
    return None


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    JOBS = Jobs(json.loads(Path(sys.argv[1]).read_text()))
    SERVER = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    PORT = SERVER.server_address[1]
    import nnsight  # noqa: F401  (before the first job, whose time would count it)

    print(PORT, flush=True)
    SERVER.serve_forever()

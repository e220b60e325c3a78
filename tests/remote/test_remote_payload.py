"""What leaves this machine: plain data and the interpreter; and what is not let in."""

from __future__ import annotations

import inspect
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from loopback_host import Loopback

import circuitlab
from circuitlab import RemoteError, Site, TracedModel, interpreter
from circuitlab.remote.replies import plain, read_result, read_status

IDS = [[3, 4, 5, 6, 7], [1, 2, 3]]


class Reader(pickle.Unpickler):
    """Reads a payload and notes every name in it that stands for code."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.names: set[tuple[str, str]] = set()
        self.functions: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        self.names.add((module, name))
        if name == "_load_function":
            return self._note
        if name == "_fill":
            return lambda *_: None
        assert module.partition(".")[0] in ALLOWED, (module, name)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return str(pid)

    def _note(self, source: str, name: str, *_: Any) -> Any:
        self.functions[name] = source
        return lambda *_: None


#: Packages that a host has.
ALLOWED = {"torch", "nnsight", "cloudpickle", "collections", "builtins", "copyreg", "typing"}


def opened(host: Loopback, job: str) -> tuple[Reader, Any]:
    """A payload's reader and what it holds."""
    content = zstandard.ZstdDecompressor().decompress(host.payload(job))
    reader = Reader(content)
    return reader, reader.load()


def gradient_run(model: TracedModel) -> Any:
    """A run that reads, writes and differentiates."""
    whole = torch.zeros(1000, 16)
    return model.run(
        IDS,
        read=[Site("z", 0)],
        write={Site("resid_pre", 1, position=2): whole[3]},
        gradient_of=lambda logits: logits[:, 3],
        gradient_at=[Site("resid_pre", 1)],
    )


def test_payload_holds_plans_and_the_interpreter(host: Loopback, far_ids: TracedModel) -> None:
    """Every name of code in it is of a package the host has, or one of the interpreter's two."""
    _ = gradient_run(far_ids).logits
    jobs = host.log()[-2:]
    for entry in jobs:
        reader, (_, (source, names, values)) = opened(host, entry["job"])
        written = {
            name: inspect.getsource(getattr(interpreter, name)) for name in ("interpret", "visit")
        }
        assert reader.functions == written
        assert {name for name, _ in reader.names if name.startswith("circuitlab")} == set()
        assert "self" not in source
        assert set(names) <= {"nnsight", "torch", "interpret"}
        assert set(values) <= {"envoy", "shipments"}
        assert_plain(values["shipments"])


def assert_plain(value: Any) -> None:
    """Only tensors, numbers, texts and slices in plain containers."""
    if isinstance(value, dict):
        assert type(value) is dict
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        assert type(value) in (list, tuple), type(value)
        for part in value:
            assert_plain(part)
        return
    if type(value) is slice:
        return assert_plain([value.start, value.stop, value.step])
    allowed = (torch.Tensor, str, int, float, bool, type(None))
    assert type(value) in allowed, type(value)


def test_payload_is_no_larger_than_what_is_written(host: Loopback, far_ids: TracedModel) -> None:
    """A row of a large tensor travels without the rest, and what is repeated is sent once."""
    rows = torch.randn(1000, 16)
    run = far_ids.run([IDS[0]] * 500, write={Site("resid_pre", 1, position=2): rows[3]})
    _ = run.logits
    _, (_, (_, _, values)) = opened(host, host.log()[-1]["job"])
    ((_, plan, _),) = values["shipments"]
    stored = [part.untyped_storage().nbytes() for step in plan for part in step if is_tensor(part)]
    # One row of 16 numbers, for all 500 prompts.
    assert max(stored) == 16 * 4


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def test_interpreter_names_nothing_but_torch() -> None:
    """The module that travels imports torch and typing alone, and its functions have no globals
    beside."""
    source = inspect.getsource(interpreter)
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert imports == [
        "from __future__ import annotations",
        "from typing import Any",
        "import torch",
    ]
    for function in (interpreter.interpret, interpreter.visit):
        names = inspect.getclosurevars(function)
        assert set(names.globals) <= {"torch", "visit"}


class Attack:
    """Unpickled as it was meant to be, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return zstandard.compress(buffer.getvalue())


def test_a_reply_cannot_run_code(host: Loopback, far_ids: TracedModel, tmp_path: Path) -> None:
    """A host whose result wants to create a file here is refused, and the file is not there."""
    trap = tmp_path / "trap"
    host.tell(hostile=str(trap))
    run = far_ids.run(IDS)
    with pytest.raises(RemoteError, match="wants to run code here"):
        _ = run.logits
    assert not trap.exists()
    # The same bytes, read the way nnsight reads them, do create it: the attack is one.
    torch.load(io.BytesIO(zstandard.decompress(packed(Attack(trap)))), weights_only=False).close()
    assert trap.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no zstd", zstandard.compress(b"no pickle"), zstandard.compress(pickle.dumps([1]))[:9]],
)
def test_damaged_results_are_refused(content: bytes) -> None:
    """Whatever else comes is one clear error."""
    with pytest.raises(RemoteError, match="was refused"):
        read_result(content, compressed=True)


def test_results_are_plain() -> None:
    """Tensors and containers come through as they are; everything else is refused."""
    tensor = torch.arange(3.0, requires_grad=True)
    value = {"results": [{("a", "output", 0): tensor}, {"dtype": "torch.float32", "n": 1}]}
    found = read_result(packed(value), compressed=True)
    place = found["results"][0]["a", "output", 0]
    assert torch.equal(place, tensor.detach())
    assert not place.requires_grad
    assert found["results"][1] == {"dtype": "torch.float32", "n": 1}
    for wrong in (torch.nn.Linear(1, 1), Path("a"), {1, 2}, b"bytes", 1j):
        with pytest.raises(RemoteError, match="was refused"):
            plain([wrong])


def test_too_large_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would unpack to more than there may be is not unpacked."""
    monkeypatch.setattr("circuitlab.remote.replies.LARGEST", 1000)
    with pytest.raises(RemoteError, match="unpack to"):
        read_result(zstandard.compress(bytes(10_000_000)), compressed=True)


@pytest.mark.parametrize("content", [b"<html>", b"[1]", b"", b"\xff\xfe", b'"a"', b"null"])
def test_answers_that_are_no_status_are_refused(content: bytes) -> None:
    """A server that is something else is told from one that refuses."""
    with pytest.raises(RemoteError, match="no status of a job"):
        read_status(content)


def test_hosts_do_not_have_circuitlab(host: Loopback, far_ids: TracedModel) -> None:
    """The server cannot import CircuitLab, though this process can: what ran there travelled."""
    from circuitlab.remote.engine import Shipment

    engine: Any = far_ids._engine
    engine.send([Shipment(None, [("dtype",)])])
    assert "circuitlab" in sys.modules
    assert "NoCircuitLab" in (Path(__file__).parent.parent / "loopback" / "server.py").read_text()
    assert circuitlab.__version__

"""What a host refuses, loses and breaks: three different messages, tries again, and a way back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_host import Loopback

from circuitlab import RemoteError, Site, TracedModel
from circuitlab.progress import listening

IDS = [[3, 4, 5]]
Loader = Callable[..., TracedModel]


def logits(model: TracedModel) -> torch.Tensor:
    """Logits of a small run."""
    return model.run(IDS).logits


def refused(on_host: Loader, name: str = "test/ids", **options: Any) -> str:
    """What is said where loading is refused; the exit code is that of remote failures."""
    with pytest.raises(RemoteError) as raised:
        on_host(name, **options)
    assert raised.value.exit_code == 6
    return str(raised.value)


def test_no_key(host: Loopback, on_host: Loader) -> None:
    """A host that wants a key, and none is set: that is said, and where to set it."""
    host.tell(key="right")
    message = refused(on_host)
    assert "wants an API key, and none is set" in message
    assert "NDIF_API_KEY" in message


def test_wrong_key(host: Loopback, on_host: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key is said to be refused, and is not repeated, though the host repeats it."""
    host.tell(key="right")
    monkeypatch.setenv("NDIF_API_KEY", "canary-of-a-wrong-key")
    message = refused(on_host)
    assert "refused the API key" in message
    assert "canary" not in message
    assert "***" in message


def test_key_goes_to_the_host_alone(
    host: Loopback, on_host: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right key opens; it is in a header of the submission and nowhere else in it."""
    host.tell(key="right-key")
    monkeypatch.setenv("NDIF_API_KEY", "right-key")
    model = on_host("test/ids")
    last = host.log()[-1]
    assert last["headers"]["ndif-api-key"] == "right-key"
    assert last["headers"]["nnsight-version"] == version("nnsight")
    assert "right-key" not in str(last["envelope"])
    import zstandard

    assert b"right-key" not in zstandard.decompress(host.payload(last["job"]))
    engine: Any = model._engine
    assert "right-key" not in repr(engine.client)


def test_model_that_is_not_hosted(on_host: Loader) -> None:
    """The model is named, and where to see what there is."""
    message = refused(on_host, remote_key="test/elsewhere")
    assert "does not have model" in message
    assert "test/elsewhere" in message
    assert "/status" in message


def test_other_version(host: Loopback, on_host: Loader) -> None:
    """Both versions are named."""
    host.tell(least_version="99.1", other_version="99.2")
    message = refused(on_host)
    assert "another version" in message
    assert f"here nnsight {version('nnsight')}" in message
    assert "there nnsight 99.2" in message
    assert "99.1" in message


def test_nobody_there(on_host: Loader) -> None:
    """An address where nobody listens is given up after a few tries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = refused(on_host, remote=f"http://127.0.0.1:{port}")
    assert "cannot be reached" in message
    assert "check the address" in message


@pytest.mark.parametrize("trouble", [{"fail": 3}, {"drop": 3}, {"drop_after": 2}, {"stall": 3}])
def test_passing_trouble(
    host: Loopback, far_ids: TracedModel, near_ids: TracedModel, trouble: dict[str, int]
) -> None:
    """5xx, broken connections and waiting are got over, and the numbers are right."""
    host.tell(**trouble)
    torch.testing.assert_close(logits(far_ids), logits(near_ids), rtol=1e-5, atol=1e-5)


def test_pauses_grow(host: Loopback, far_ids: TracedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries are 1, 2, 4 … units apart at most, half of it at least, never more than the longest."""
    waited: list[float] = []
    monkeypatch.setattr("circuitlab.remote.client.FIRST_PAUSE", 1.0)
    monkeypatch.setattr("circuitlab.remote.client.LONGEST_PAUSE", 6.0)
    monkeypatch.setattr("circuitlab.remote.client.time.sleep", waited.append)
    host.tell(fail=5)
    logits(far_ids)
    longest = [1.0, 2.0, 4.0, 6.0, 6.0]
    assert all(most / 2 <= pause <= most for pause, most in zip(waited, longest, strict=False))
    assert len({round(pause / most, 6) for pause, most in zip(waited, longest, strict=False)}) > 1


def test_lost_job_is_sent_again(
    host: Loopback, far_ids: TracedModel, near_ids: TracedModel
) -> None:
    """A host that forgets a job gets it again."""
    host.tell(lose=2)
    before = len(host.log())
    torch.testing.assert_close(logits(far_ids), logits(near_ids), rtol=1e-5, atol=1e-5)
    assert len(host.log()) == before + 3


def test_job_that_is_always_lost(host: Loopback, far_ids: TracedModel) -> None:
    """After some times it is given up."""
    host.tell(lose=100)
    with pytest.raises(RemoteError, match="lost the same job 3 times"):
        logits(far_ids)


def test_results_that_are_gone(host: Loopback, far_ids: TracedModel, near_ids: TracedModel) -> None:
    """A result that is kept no more is computed again."""
    host.tell(no_results=1)
    torch.testing.assert_close(logits(far_ids), logits(near_ids), rtol=1e-5, atol=1e-5)


def test_results_from_unsafe_places(host: Loopback, far_ids: TracedModel) -> None:
    """A host cannot have a result fetched over plain http from elsewhere."""
    host.tell(result_url="http://example.org/result")
    with pytest.raises(RemoteError, match=r"cannot be fetched: .*not https"):
        logits(far_ids)


def test_queue_position_and_timeout(
    host: Loopback, on_host: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place in the queue is told as progress; in the end time is over, and that is said."""
    monkeypatch.setattr("circuitlab.remote.client.QUIET", 0.0)
    model = on_host("test/ids", timeout=600.0)
    engine: Any = model._engine
    engine.client.timeout = 0.5
    host.tell(stall=1_000_000)
    told: list[str] = []
    with (
        listening(lambda text, done, total: told.append(text)),
        pytest.raises(RemoteError, match=r"is not done: QUEUED .* after 0\.5 s; .*--timeout"),
    ):
        logits(model)
    assert any("QUEUED Your job is queued at position" in text for text in told)


def test_large_work_is_told_of(
    host: Loopback, far_ids: TracedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many plans and how many bytes are about to be sent is said before they are."""
    monkeypatch.setattr("circuitlab.remote.client.LARGE", 0)
    told: list[str] = []
    runs = [far_ids.run(IDS) for _ in range(3)]
    with listening(lambda text, done, total: told.append(text)):
        _ = runs[0].logits
    assert told[0] == f"{host.url}: sending 3 plans, 0.0 MB"


def test_error_in_the_job(host: Loopback, far_ids: TracedModel) -> None:
    """What fails beside the model is told in its own last line, with the job's id."""
    from circuitlab.remote.engine import Shipment

    engine: Any = far_ids._engine
    with pytest.raises(RemoteError, match="failed on") as raised:
        engine.send([Shipment(None, [("weights", "transformer.nowhere")])])
    assert host.log()[-1]["job"] in str(raised.value)
    assert "nowhere" in str(raised.value)


def test_failing_within_the_self_check(
    host: Loopback, on_host: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that fails then is a remote failure, and no model that is not understood."""
    from circuitlab.remote.client import Client

    run = Client.run

    def fails_later(client: Client, *work: Any) -> Any:
        if client.jobs == 2:
            host.tell(least_version="99")
        return run(client, *work)

    monkeypatch.setattr(Client, "run", fails_later)
    assert "another version" in refused(on_host)


def test_weights_kept_from_code(host: Loopback, far_ids: TracedModel) -> None:
    """A host that runs code where the weights are not is named as such, and gives no wrong ones."""
    host.tell(untrusted=True)
    engine: Any = far_ids._engine
    with pytest.raises(RemoteError, match="beside the model"):
        engine.weights(["transformer.wte"])


@pytest.mark.parametrize("saved", [None, [], {"results": [3]}, {"results": [{}]}])
def test_results_that_are_none(
    far_ids: TracedModel, monkeypatch: pytest.MonkeyPatch, saved: Any
) -> None:
    """A host that gives something plain, but no result, is told of as such."""
    monkeypatch.setattr("circuitlab.remote.client.Client.run", lambda *_: saved)
    with pytest.raises(RemoteError, match=r"no result for each plan|has no logits"):
        logits(far_ids)
    engine: Any = far_ids._engine
    monkeypatch.setattr("circuitlab.remote.client.Client.run", lambda *_: {"results": [{}]})
    with pytest.raises(RemoteError, match="unknown type"):
        engine.dtype_and_weights([])


def test_job_is_taken_up(host: Loopback, on_host: Loader, tmp_path: Path) -> None:
    """The id is on the disk while the job runs; the same work then sends nothing."""
    log = tmp_path / "state.jobs"
    model = on_host("test/ids", job_log=log)
    sent, lines = len(host.log()), len(log.read_text().splitlines())
    host.tell(stall=20)
    run = model.run(IDS, read=[Site("z", 1)])
    found: list[int] = []

    def look() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and len(found) < 1:
            if len(log.read_text().splitlines()) > lines:
                found.append(len(log.read_text().splitlines()))

    watcher = threading.Thread(target=look)
    watcher.start()
    first = run.logits
    watcher.join()
    assert found == [lines + 1]
    assert len(host.log()) == sent + 1
    again = on_host("test/ids", job_log=log)
    assert torch.equal(again.run(IDS, read=[Site("z", 1)]).logits, first)
    assert len(host.log()) == sent + 1
    # Other work is other work.
    _ = again.run(IDS, read=[Site("z", 0)]).logits
    assert len(host.log()) == sent + 2


def test_old_or_damaged_job_logs(
    host: Loopback, on_host: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that are forgotten, failed, of another host or too old are sent again."""
    log = tmp_path / "state.jobs"

    def sent() -> int:
        before = len(host.log())
        on_host("test/ids", job_log=log)
        return len(host.log()) - before

    all_of_them = sent()
    assert all_of_them == 3
    assert sent() == 0
    known = log.read_text()
    log.write_text(known.replace('"job": "', '"job": "gone-') + '{"work": "cut o')
    assert sent() == all_of_them
    log.write_text(known.replace(host.url, "https://example.org"))
    assert sent() == all_of_them
    monkeypatch.setattr("circuitlab.remote.job_log.KEPT", -1)
    assert sent() == all_of_them

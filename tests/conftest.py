"""Shared fixtures: small models on disk, tasks for them, and the command line run two ways."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from installed import describe
from oracles import random_gpt2

import circuitlab

ROOT = Path(__file__).parent.parent

# Whoever starts the tests in the background has them ignore Ctrl-C, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: Sentences from which the text model's tokenizer learns its words.
CORPUS = (
    "When Mary and John went to the store, John gave a drink to Mary",
    "When Mary and John went to the store, Mary gave a drink to John",
    "When Tom and Anna went to the park, Tom gave a book to Anna",
)


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as JSON; NaN and Infinity, which are no JSON, fail."""
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


Runner = Callable[..., Done]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small models: a second thread costs more in waiting than it does work."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def lab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Runner]:
    """``lab("trace", "--model", ...)``: the command line in this process, in its own folder."""

    # Its logger keeps the stderr it meets first, which must not be one test's.
    with capsys.disabled():
        import transformers  # noqa: F401

    from circuitlab.cli import main, screen

    for name in [name for name in os.environ if name.startswith("CIRCUITLAB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))  # plugins that are off
    # setenv before delenv: a value that the command sets is taken back at the end.
    for name in ("HF_HUB_OFFLINE", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    # So that it is as it was again after --offline.
    offline = importlib.import_module("huggingface_hub.constants").HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Done:
        for name in ("quiet", "color", "progress"):
            monkeypatch.setattr(screen.Screen, name, name != "quiet")
        with pytest.MonkeyPatch.context() as inner:
            for name, value in (env or {}).items():
                inner.setenv(name, value)
            _fresh_plugins(inner)
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return Done(stopped.value.code, out, err)

    yield run
    signal.signal(signal.SIGTERM, handler)


def _fresh_plugins(patch: pytest.MonkeyPatch) -> None:
    """Have the command line look for plugins again, as a new process would."""
    from circuitlab.cli.commands import circuitlab as commands
    from circuitlab.cli.trace import trace

    patch.setattr(trace, "_registry", None)
    patch.setattr(commands, "_offered", None)


@pytest.fixture
def process_env(tmp_path: Path) -> dict[str, str]:
    """Environment of a real process: none of this one's settings, a home of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CIRCUITLAB_", "HF_", "XDG_"))}
    paths = [*map(str, (tmp_path / "site", ROOT, ROOT / "plugins")), kept.get("PYTHONPATH", "")]
    return kept | {
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def process(tmp_path: Path, process_env: dict[str, str]) -> Runner:
    """``process("tasks", "show", ...)``: the command line in a process of its own."""

    def run(
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
    ) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "circuitlab", *map(str, arguments)],
            env={**process_env, **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            timeout=600,
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ids_module() -> Any:
    """A random GPT-2 of 2 layers and 2 heads, float32, that reads token ids alone."""
    import torch

    return random_gpt2(dtype=torch.float32, seed=3)


@pytest.fixture(scope="session")
def ids_model(tmp_path_factory: pytest.TempPathFactory, ids_module: Any) -> Path:
    """Folder of :func:`ids_module`, without a tokenizer."""
    folder = tmp_path_factory.mktemp("ids-model")
    ids_module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2 with a byte-level BPE tokenizer, as GPT-2's own is."""
    return _save_text_model(tmp_path_factory.mktemp("text-model"), bos=False)


@pytest.fixture(scope="session")
def bos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a tokenizer that puts BOS in front of text."""
    return _save_text_model(tmp_path_factory.mktemp("bos-model"), bos=True)


def _save_text_model(folder: Path, *, bos: bool) -> Path:
    import torch

    tokenizer = _byte_tokenizer(bos=bos)
    module = random_gpt2(vocab=len(tokenizer), n_positions=48, dtype=torch.float32, seed=5)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_tokenizer(*, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer that knows the words of :data:`CORPUS`; with BOS if asked."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


# --- tasks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ids_pairs(ids_module: Any) -> list[dict[str, Any]]:
    """Eight pairs of token ids of equal length; corruption costs each of them logit difference."""
    import torch

    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 40, (8, 6), generator=generator)
    corrupt = torch.cat([clean[:, :2], torch.randint(0, 40, (8, 4), generator=generator)], 1)
    with torch.no_grad():
        change = ids_module(corrupt).logits[:, -1] - ids_module(clean).logits[:, -1]
    return [
        {
            "clean": a.tolist(),
            "corrupt": b.tolist(),
            "answers": [int(c.argmin())],
            "wrong_answers": [int(c.argmax())],
        }
        for a, b, c in zip(clean, corrupt, change, strict=True)
    ]


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., Path]:
    """``write_pairs(pairs, name=...)``: a task file in JSON."""

    def write(pairs: Sequence[Mapping[str, Any]], **top: Any) -> Path:
        path = tmp_path / "task.json"
        path.write_text(json.dumps({**top, "prompts": list(pairs)}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def ids_task(write_pairs: Callable[..., Path], ids_pairs: list[dict[str, Any]]) -> Path:
    """Task file of :func:`ids_pairs`."""
    return write_pairs(ids_pairs)


# --- plugins --------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages that ``lab`` and ``process`` see; gone afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def install(site: Path) -> Callable[..., None]:
    """``install(distribution, plugin, source)``: lays a plugin out in ``site`` as pip would.

    That is its module, and beside it a dist-info folder with metadata and an entry point.
    """

    def lay_out(distribution: str, plugin: str, source: str, version: str = "0.1") -> None:
        module = distribution.replace("-", "_")
        (site / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        describe(site, distribution, version, {plugin: module})
        importlib.invalidate_caches()

    return lay_out


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a tensor as a direction file, the same one each time."""
    from safetensors.torch import save_file

    def save(tensor: Any) -> Path:
        path = tmp_path / "direction.safetensors"
        save_file({"direction": tensor.contiguous()}, path)
        return path

    return save


@pytest.fixture
def circuit_file(tmp_path: Path) -> Path:
    """A small circuit that was traced before, without tracing."""
    circuit = circuitlab.CircuitGraph()
    circuit.add_component("input", kind="input", layer=0)
    circuit.add_component("a0.h1", kind="head", layer=0, head=1)
    circuit.add_component("logits", kind="logits", layer=2)
    circuit.add_effect("input", "a0.h1", -1.5, port="q")
    circuit.add_effect("a0.h1", "logits", -2.0)
    circuit.add_effect("input", "logits", 0.5)
    circuit.graph.update(model="toy", task="toy-task", metric="logit-difference", n_layers=2)
    circuit.graph.update(n_heads=2, d_model=16, analysis="edge-attribution")
    path = tmp_path / "circuit.json"
    path.write_text(circuit.to_json(), encoding="utf-8")
    return path

"""Models that cannot be had, or are not understood: exit 4, one line, and what to do."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Lab = Callable[..., Any]


def refused(done: Any) -> str:
    """The one error line of a model that was refused."""
    assert (done.code, done.out) == (4, "")
    assert "Traceback" not in done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture
def folder(tmp_path: Path, ids_model: Path) -> Path:
    """A copy of the ids model to spoil."""
    return Path(shutil.copytree(ids_model, tmp_path / "spoilt"))


def configure(folder: Path, **values: Any) -> None:
    """Change a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


# --- 30: architectures ----------------------------------------------------------------------------


def undescribed() -> dict[str, Any]:
    """Small models of families that no plugin describes; XLM keeps no list of blocks."""
    import transformers as t

    size: dict[str, Any] = {"vocab_size": 40}
    wide = size | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "opt": t.OPTConfig(**wide, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16),
        "xlm": t.XLMConfig(**size, emb_dim=16, n_layers=2, n_heads=2, causal=True, pad_index=0),
    }


def save(family: str, folder: Path) -> None:
    """A random model of the family."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(undescribed()[family]).save_pretrained(folder)


ASKED = ("--model", "m", "--task-file", "pairs.json", "--allow-weak")


def test_row_30_an_unknown_family_says_what_still_works(lab: Lab, tmp_path: Path) -> None:
    """What needs heads is refused and names what does not, the plugins asked, and the hook."""
    save("opt", tmp_path / "m")
    pair = {"clean": [1, 2, 3], "corrupt": [1, 5, 3], "answers": [7], "wrong_answers": [8]}
    task = {"name": "ids", "metric": "logit-difference", "prompts": [pair]}
    (tmp_path / "pairs.json").write_text(json.dumps(task), "utf-8")
    message = refused(lab("trace", *ASKED))
    assert "edge-attribution needs the heads, MLPs and norms of model 'm'" in message
    assert "no plugin describes family 'opt' (asked: defaults, model-families)" in message
    works = "activation-plateaus, dict train, dose-response, path-patching, token-ablation"
    assert f"what works on the stream between its blocks: {works};" in message
    assert "adapt_architecture" in message
    message = refused(lab("dict", "cards", "--model", "m"))
    assert "dict cards needs the heads, MLPs and norms of model 'm'" in message
    message = refused(lab("trace", "path-patching", *ASKED))
    assert "--scope edges needs the heads and MLPs of model 'm'" in message
    assert "use --scope nodes or --scope residual" in message
    for works in (("path-patching", "--scope", "nodes"), ("dose-response",), ("token-ablation",)):
        done = lab("trace", *works, *ASKED)
        assert done.code == 0, done.err
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3, 4]\n" * 64, "utf-8")
    texts = ("--model", "m", "--data", "ids.jsonl", "--sites", "block.1")
    done = lab("dict", "train", *texts, "--interaction", "none", "--steps", "2")
    assert done.code == 0, done.err
    assert "only the stream" in refused(lab("dict", "train", *texts, "--output", "other"))


@pytest.mark.parametrize("command", [("models", "check"), ("doctor",)])
def test_row_30_the_checks_of_an_unknown_family(
    command: tuple[str, ...], lab: Lab, tmp_path: Path
) -> None:
    """What holds of its blocks is shown, and which analyses work on them."""
    save("opt", tmp_path / "m")
    done = lab(*command, "m")
    assert done.code == 0
    assert "opt, 2 layers, blocks alone" in done.out
    assert "holds\tblock 1 reads what block 0 hands on" in done.out
    assert "works on it: activation-plateaus, dict train, dose-response, path-patching" in done.out


def test_row_30_a_model_without_blocks_names_what_was_looked_for(lab: Lab, tmp_path: Path) -> None:
    """Family and class of the model, the plugins asked, the list that is not there, the hook."""
    save("xlm", tmp_path / "m")
    for command in (("models", "check", "m"), ("trace", "--model", "m", "--task", "ioi-mini")):
        message = refused(lab(*command))
        assert "model 'm' is of family 'xlm' (XLMWithLMHeadModel)" in message
        assert "(asked: defaults, model-families)" in message
        assert "a list of 2 blocks was looked for" in message
        assert "no analysis works until a plugin offers adapt_architecture" in message


def test_row_30_gpt2_with_cross_attention_is_refused(lab: Lab, folder: Path) -> None:
    """A third writer in a block is named: a circuit of heads and MLPs would leave it out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config.from_pretrained(folder, add_cross_attention=True)
    GPT2LMHeadModel(config).save_pretrained(folder)
    assert "cross-attention" in refused(lab("models", "check", folder))


def test_row_30_an_encoder_is_no_causal_model(lab: Lab, tmp_path: Path) -> None:
    """A family that predicts no next token is refused by name."""
    import transformers as t

    config = t.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    t.ViTModel(config).save_pretrained(tmp_path / "vit")
    message = refused(lab("models", "check", "vit"))
    assert "model folder 'vit' cannot be loaded" in message
    assert "ViTConfig" in message


def test_row_30_a_module_that_is_not_where_the_family_has_it(
    lab: Lab, install: Any, ids_model: Path
) -> None:
    """A path that an adapter claims and the model lacks is named."""
    install("circuitlab-lost", "lost", '''
        import dataclasses
        import circuitlab

        @circuitlab.hookimpl
        def adapt_architecture(config):
            from circuitlab.architectures import gpt2
            return dataclasses.replace(gpt2(config), mlp="feed_forward", family="GPT-9")
        ''')  # fmt: skip
    message = refused(lab("models", "check", ids_model))
    assert "was taken for GPT-9" in message
    assert "has no module 'transformer.h.0.feed_forward'" in message


def test_row_30_models_check_lists_what_holds(lab: Lab, ids_model: Path) -> None:
    """For a model that is understood each check, its difference and its tolerance are shown."""
    done = lab("models", "check", ids_model)
    assert (done.code, done.err) == (0, "")
    assert "2 layers, 2 heads" in done.out
    rows = [line.split("\t") for line in done.out.splitlines()[2:]]
    assert len(rows) >= 4
    assert {row[0] for row in rows} == {"holds"}
    assert all(float(row[2]) <= float(row[3]) for row in rows)


# --- 31: gated ------------------------------------------------------------------------------------


def _hub(port: int) -> dict[str, str]:
    """Environment of a process that takes this port of this machine for the hub."""
    return {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "no_proxy": "*", "NO_PROXY": "*"}


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "is gated or private: accept its terms on its page, then log in with"),
        (401, "", "is gated or private: accept its terms on its page, then log in with"),
        (401, "RepoNotFound", "the hub has no such repository, or it is private"),
        (404, "RepoNotFound", "the hub has no such repository, or it is private"),
    ],
)
def test_row_31_what_the_hub_answers_is_said(
    status: int, code: str, expected: str, process: Callable[..., Any]
) -> None:
    """A gated repository and one that is not there are told apart by the hub's own answer."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        token = "hf_" + "x" * 34
        env = {**_hub(hub.server_port), "HF_TOKEN": token}
        done = process("models", "check", "someone/some-model", env=env)
        hub.shutdown()
    assert expected in refused(done)
    assert "HF_TOKEN" in done.err
    assert token not in done.err


# --- 32: offline ----------------------------------------------------------------------------------


def test_row_32_offline_and_not_cached_gives_the_command(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--offline`` opens no connection, and the way to get the model is written out."""

    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    done = lab("trace", "--model", "someone/some-model", "--task", "ioi-mini", "--offline")
    message = refused(done)
    assert "huggingface-cli download someone/some-model" in message
    assert "or give a local folder" in message


def test_row_32_a_hub_that_cannot_be_reached_is_no_hang(process: Callable[..., Any]) -> None:
    """A port that nobody listens at ends in the same line, within seconds, whatever its number."""
    with socket.socket() as unused:  # bound and not listening: nobody else gets it meanwhile
        port = next(p for p in range(40_100, 40_200) if _bound(unused, p))  # 401 is no status here
        started = time.monotonic()
        done = process("models", "check", "someone/some-model", env=_hub(port))
    assert "huggingface-cli download someone/some-model" in refused(done)
    assert time.monotonic() - started < 120  # most of it is importing torch on a busy machine


def _bound(connection: socket.socket, port: int) -> bool:
    try:
        connection.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "file.bin"])
def test_row_32_a_path_that_is_no_folder_is_not_looked_up(name: str, lab: Lab) -> None:
    """What can only be a path is never sent to the hub."""
    Path("file.bin").write_bytes(b"x")
    message = refused(lab("models", "check", name))
    assert f"model '{name}' is not a folder; give a bundled name (" in message
    assert "model.safetensors" in message


# --- 33: code of the model ------------------------------------------------------------------------


def test_row_33_a_model_that_carries_code_is_refused_by_default(lab: Lab, folder: Path) -> None:
    """The code is named and not run; ``--trust-remote-code`` runs it."""
    mark = folder / "ran"
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'gpt2'\n"
        "class Own(GPT2LMHeadModel):\n    config_class = OwnConfig\n",
        encoding="utf-8",
    )
    configure(folder, auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    message = refused(lab("models", "check", folder))
    assert "wants to run its own code (own.Own, own.OwnConfig)" in message
    assert "--trust-remote-code" in message
    assert not mark.exists()
    env = {"HF_MODULES_CACHE": str(folder)}
    done = lab("models", "check", folder, "--trust-remote-code", env=env)
    assert mark.exists()
    assert done.code == 0


# --- 34: weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 6, 500, -100])
def test_row_34_truncated_weights_are_detected(keep: int, lab: Lab, folder: Path) -> None:
    """A safetensors file cut anywhere is called damaged; no half model runs."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    message = refused(lab("models", "check", folder))
    assert str(folder) in message
    assert "truncated or damaged" in message


def test_row_34_missing_weights_are_not_drawn_at_random(lab: Lab, folder: Path) -> None:
    """A file that lacks one matrix, or has another shape, is refused and the matrix named."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    message = refused(lab("models", "check", folder))
    assert "lack transformer.h.1.mlp.c_fc.weight (1 missing" in message
    weights["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    message = refused(lab("models", "check", folder))
    assert "another shape for transformer.h.1.mlp.c_fc.weight, [3, 3] for [16, 64]" in message


def test_row_34_a_pickle_needs_a_flag(lab: Lab, folder: Path) -> None:
    """Weights that only a pickle holds are refused, and the flag named there reads them."""
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    os.remove(path)
    message = refused(lab("models", "check", folder))
    assert "only as a pickle (.bin), which can run code" in message
    assert "--allow-pickle" in message
    assert lab("models", "check", folder, "--allow-pickle").code == 0


def test_row_34_a_pickle_that_runs_code_does_not(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """Even with ``--allow-pickle``, a pickle that calls something is refused, not obeyed."""

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "evil"),))

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(lab("models", "check", folder, "--allow-pickle"))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("text", "fact"),
    [(None, "no readable config.json"), ("{", "is not JSON"), ("[]", "does not hold a JSON object"),
     ("{}", "cannot be loaded")],
)  # fmt: skip
def test_row_34_a_broken_config_is_named(
    text: str | None, fact: str, lab: Lab, folder: Path
) -> None:
    """A folder whose config.json is missing or malformed says so."""
    config = folder / "config.json"
    config.unlink()
    if text is not None:
        config.write_text(text, encoding="utf-8")
    message = refused(lab("models", "check", folder))
    assert fact in message
    assert "spoilt" in message


def test_row_34_a_folder_without_weights_is_named(lab: Lab, folder: Path) -> None:
    """No weights at all: the file that is expected is named."""
    (folder / "model.safetensors").unlink()
    assert "has no weights; expected model.safetensors" in refused(lab("models", "check", folder))


# --- 35: versions ---------------------------------------------------------------------------------


def test_row_35_other_versions_are_one_line_and_no_more(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that was not tested is named once on stderr, the run goes on, doctor shows it."""
    from circuitlab.cli import installed

    asked = ("trace", "--model", "gate-and", "--verify", "0")
    assert "not tested" not in lab(*asked).err
    tested = {**installed.TESTED, "nnsight": "0.1", "torch": "1.0"}
    monkeypatch.setattr(installed, "TESTED", tested)
    done = lab(*asked)
    assert done.code == 0
    lines = [line for line in done.err.splitlines() if "not tested" in line]
    assert len(lines) == 1
    assert "nnsight 0." in lines[0]
    assert "(tested with 0.1)" in lines[0]
    assert "(tested with 1.0)" in lab("doctor").out

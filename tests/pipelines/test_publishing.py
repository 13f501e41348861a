"""What of a student goes to the hub, what is said where it cannot, and what a stranger gets of it:
loaded by plain transformers, served from the hub, asked.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from huggingface_hub import HfApi, ModelCard
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.publishing import gather, parse_target, upload
from shared.cache.manifest import load_manifest
from shared.settings.config import TrainConfig
from shared.system.files import TideError
from student_train.export import Format, export_student, write_card
from student_train.using.settings import SampleConfig
from student_train.using.student import load_for_use, sample

NAMES = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "LICENSE",
         "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
COMMIT = "0" * 39 + "1"


class Hub:
    """In memory, of one repository: as much as publishing and downloading need."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private = False

    async def create(self, request: Request) -> Response:
        if request.headers.get("authorization") != "Bearer secret":
            return JSONResponse({"error": "Invalid credentials"}, 401)
        self.private = (await request.json()).get("visibility") == "private"
        return JSONResponse({"url": f"{request.base_url}me/small"})

    async def validate(self, _: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request: Request) -> Response:
        paths = [file["path"] for file in (await request.json())["files"]]
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        return JSONResponse({"files": [{"path": path, **modes} for path in paths]})

    async def commit(self, request: Request) -> Response:
        for line in map(json.loads, (await request.body()).splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{request.base_url}me/small/commit/{COMMIT}"
        return JSONResponse({"success": True, "commitOid": COMMIT, "commitUrl": url})

    async def tree(self, _: Request) -> Response:
        found = [{"path": path, "size": len(held)} for path, held in self.files.items()]
        return JSONResponse([{"type": "file", "oid": COMMIT, **about} for about in found])

    async def info(self, _: Request) -> Response:
        siblings = [{"rfilename": path} for path in self.files]
        return JSONResponse({"id": "me/small", "sha": COMMIT, "siblings": siblings, "tags": []})

    async def resolve(self, request: Request) -> Response:
        held = self.files.get(request.path_params["path"])
        if held is None:
            return JSONResponse({"error": "none"}, 404, {"x-error-code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(held).hexdigest()}"'
        return Response(held, headers={"etag": etag, "x-repo-commit": COMMIT})


@contextmanager
def running(hub: Hub) -> Iterator[str]:
    """The hub on a free port; its address."""
    api, post = "/api/models/me/small", ["POST"]
    routes = [
        Route("/api/repos/create", hub.create, methods=post),
        Route("/api/validate-yaml", hub.validate, methods=post),
        Route(f"{api}/preupload/main", hub.preupload, methods=post),
        Route(f"{api}/commit/main", hub.commit, methods=post),
        Route(f"{api}/tree/{{revision}}", hub.tree),
        Route(f"{api}/revision/{{revision}}", hub.info),
        Route(api, hub.info),
        Route("/me/small/resolve/{revision}/{path:path}", hub.resolve),
    ]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def run(student: str, tmp_path: Path) -> Path:
    """A run with a score, and with things that are nobody's business."""
    folder = tmp_path / "run"
    shutil.copytree(student, folder / "model")
    (folder / "model" / "training_args.bin").write_bytes(b"pickle")
    (folder / "model" / "notes.py").write_text("print()\n")
    (folder / "model" / "LICENSE").write_text("Apache License\n")
    (folder / "eval").mkdir()
    score = {"name": "gsm8k", "title": "GSM8K", "metric": "exact_match", "value": 0.25,
             "error": 0.01, "rows": 1319, "settings": {"limit": None, "rows": None}}  # fmt: skip
    (folder / "eval" / "gsm8k.json").write_text(json.dumps(score))
    return folder


def test_a_dry_run_says_what_would_be_sent(run: Path) -> None:
    command = ["publish", str(run), "hf://me/small", "--dry-run"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0 and all(name in done.stdout for name in NAMES)
    assert "left out: notes.py, training_args.bin" in done.stdout


def test_the_card_has_scores_data_and_licence(run: Path) -> None:
    text = gather(run, "me/small", "apache-2.0").card
    card: Any = ModelCard(text)
    assert card.data.license == "apache-2.0"
    scores = "| GSM8K | exact_match | 25.00 % | 1.00 | 1319 |"
    for words in (scores, "* data: `", "tide sample me/small", "## Licence\n\napache-2.0"):
        assert words in text
    assert text.index("## Benchmarks") < text.index("## Licence")
    assert str(run.parent) not in text
    without: Any = ModelCard(gather(run / "model", "me/small", None).card)
    assert without.data.to_dict().get("license") is None
    own = "---\nlicense: mit\n---\n\n# Mine\n\n## Benchmarks\n\nnone\n"  # stays as it is
    (run / "model" / "README.md").write_text(own)
    assert gather(run, "me/small", None).card == own


def test_what_goes_wrong_on_the_hub_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = gather(run, "me/small", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with running(Hub()) as hub:
        for place in (hub, "http://127.0.0.1:9"):
            api = HfApi(place, "wrong")
            monkeypatch.setattr("pipelines.publishing.HfApi", lambda api=api: api)
            with pytest.raises(TideError):
                upload(contents, "me/small", private=False)


def test_targets_and_folders_that_are_none(run: Path, tmp_path: Path) -> None:
    for target in ("me/small", "hf://small", "hf://me/small/more", "hf://me/a b", "s3://me/small"):
        with pytest.raises(TideError):
            parse_target(target)
    for missing in ("none", "README.md", "model.safetensors"):
        (run / "model" / missing).unlink(missing_ok=True)
        with pytest.raises(TideError):
            gather(tmp_path / "none" if missing == "none" else run, "me/small", None)


def test_an_exported_student_keeps_its_card(run: Path, tmp_path: Path) -> None:
    layouts: tuple[Format, Format] = ("hf", "a2d")
    for layout in layouts:
        out = tmp_path / layout
        export_student(run / "model", out, layout)
        assert (out / "README.md").read_bytes() == (run / "model" / "README.md").read_bytes()
        said = json.loads((out / "config.json").read_text())
        assert (said["block_size"], said["mask_token_id"]) == (32, 2047)
        assert (out / "LICENSE").exists() and not (out / "notes.py").exists()


NASTY = ["a\n\n## Licence\n\nMIT\n\n<!-- .jsonl", "x\n---\nlicense: mit\n---\n", " ## Licence",
         "`](http://x) <img src=x>", "\x1b]0;PWN\x07\x1b[2Jx", "\udcff\u202e\u2028## Benchmarks",
         "| a |\n|---|", "hf_" + "a" * 30, "long " * 9999]  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_names_of_others_are_names_alone_in_a_card(
    name: str, caches: dict[str, Path], run: Path
) -> None:
    """Of data, teacher, mask and benchmarks: one line each, in Markdown's code or without marks."""

    def card_of(name: str) -> str:
        manifest = load_manifest(caches["tiny-cross"])
        known = manifest.fingerprint
        teacher = replace(known.teacher, name=name, architecture=name, weights=name)
        known = replace(known, teacher=teacher, student=replace(known.student, mask_token=name))
        changed = replace(manifest, sources=(name, name), fingerprint=known)
        write_card(run / "model", TrainConfig(), changed, {})
        score = json.loads((run / "eval" / "gsm8k.json").read_text())
        score |= {"title": name, "metric": name}
        (run / "eval" / "gsm8k.json").write_text(json.dumps(score))
        return gather(run, "me/small", "apache-2.0").card.replace(changed.digest, "its digest")

    plain, nasty = card_of("plain"), card_of(name)
    assert ModelCard(nasty).data.to_dict() == ModelCard(plain).data.to_dict()
    assert len(nasty) < len(plain) + 2000
    assert nasty.replace("\n", "").isprintable() and "hf_aaa" not in nasty
    for ours, theirs in zip(plain.splitlines(), nasty.splitlines(), strict=True):
        if ours.startswith("|"):
            assert ours.count("|") == theirs.count("|") and not set("<`[") & set(theirs)
        else:
            assert re.sub("`[^`]*`", "", ours) == re.sub("`[^`]*`", "", theirs)


def test_a_model_elsewhere_goes_nowhere(run: Path, tmp_path: Path) -> None:
    """Its folder is a link, or its weights are: under the same name, as some tools keep them."""
    private = (run / "model").rename(tmp_path / "private")
    (run / "model").symlink_to(private)
    (tmp_path / "copy").mkdir()
    for path in private.iterdir():
        shutil.copy(path, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    (tmp_path / "copy" / "model.safetensors").symlink_to(private / "model.safetensors")
    for source in (run, tmp_path / "copy"):
        with pytest.raises(TideError, match="private"):
            gather(source, "me/small", None)
        with pytest.raises(TideError, match="private"):
            export_student(source, tmp_path / "out", "hf")
    gather(run / "model", "me/small", None)  # named by its owner


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "chat_template.jinja"])
def test_a_student_s_links_lead_nowhere_else(name: str, run: Path, tmp_path: Path) -> None:
    """Published, or exported and then published; but a hub's cache is made of links."""
    model, key = run / "model", tmp_path / "id_rsa"
    home = tmp_path / "models--me--small"
    (home / "snapshots" / COMMIT).mkdir(parents=True)
    shutil.copytree(model, home / "blobs")
    for path in (home / "blobs").iterdir():
        (home / "snapshots" / COMMIT / path.name).symlink_to(path)
    gather(home / "snapshots" / COMMIT, "me/small", None)
    key.write_text("PRIVATE")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(key)
    for use in (
        lambda: gather(run, "me/small", None),
        lambda: export_student(model, tmp_path / "out", "hf"),
    ):
        with pytest.raises(TideError, match="id_rsa"):
            use()


def test_from_the_run_to_a_stranger(student: str, tmp_path: Path) -> None:
    """Exported, loaded by plain transformers, published, served by `tide serve` with a key until a
    signal ends it amid an answer.
    """
    exported = tmp_path / "exported"
    export_student(Path(student), exported, "hf")
    stock: Any = AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours = load_for_use(student, "cpu")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, ours.model(ids).logits)
    assert stock.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert stock.config.block_size == 32 and tokenizer.mask_token_id == stock.config.mask_token_id

    hub = Hub()
    tide = [sys.executable, "-m", "pipelines.cli"]
    publish = [*tide, "publish", str(exported), "hf://me/small", "--private"]
    serve = [*tide, "serve", "me/small", "--port=0", "--device=cpu", "--block=8", "--new-tokens=16"]
    own = {"HF_TOKEN": "secret", "HF_HOME": str(tmp_path / "hf"), "TIDE_API_KEY": "k"}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    chat: Any = [{"role": "user", "content": "Write `f`."}]
    with running(hub) as place:
        environment = {**os.environ, **own, "HF_ENDPOINT": place}
        subprocess.run(publish, env=environment, check=True, capture_output=True)
        with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True, env=environment) as server:
            assert server.stderr is not None
            said = (re.search("serving me/small on (http.*/v1)", line) for line in server.stderr)
            address = next(filter(None, said))[1]
            with openai.OpenAI(base_url=address, api_key="k", max_retries=0, timeout=60) as client:
                got = client.chat.completions.create(model="me/small", messages=chat)
                more: Any = {"prompt": "x", "max_tokens": 3000, "stream": True}
                taken = iter(client.completions.create(model="me/small", **more))
                next(taken)
                server.send_signal(signal.SIGTERM)
                with pytest.raises(openai.APIError):
                    list(taken)
            assert "Traceback" not in server.stderr.read()
            assert server.wait(timeout=30) == 0
    assert hub.files["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert hub.private
    prompt = ours.tokenizer.encode_prompt(chat)
    (wanted,) = sample(ours.model, [prompt], ours.special, SampleConfig(new_tokens=16, block=8))
    assert got.choices[0].message.content == ours.tokenizer.text(wanted)

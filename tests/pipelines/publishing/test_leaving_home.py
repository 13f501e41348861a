"""A student leaves home: trained, exported, loaded by plain transformers, published, served from
the hub, asked.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_train.export import export_student
from student_train.training.trainer import train_student
from student_train.using.settings import SampleConfig
from student_train.using.student import load_for_use, sample
from tests.pipelines.publishing.hub import Hub, running
from tests.pipelines.serving.running import address_said, client, closed_clients
from tests.student_train.training.test_trainer import config


def test_from_the_cache_to_a_stranger(caches: dict[str, Path], tmp_path: Path) -> None:
    train_student(config(caches["tiny-cross"], tmp_path / "run", max_steps=4))
    export_student(tmp_path / "run" / "model", tmp_path / "exported", "hf")

    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ours = load_for_use(str(tmp_path / "run" / "model"), "cpu")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, ours.model(ids).logits)
    chat = [{"role": "user", "content": "Write `f`."}]
    assert stock.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert stock.config.block_size == 32 and tokenizer.mask_token_id == stock.config.mask_token_id

    hub = Hub("secret")
    with running(hub) as place:
        environment = {**os.environ, **place, "HF_TOKEN": "secret", "HF_HOME": str(tmp_path / "hf")}
        tide = [sys.executable, "-m", "pipelines.cli"]
        publish = [*tide, "publish", str(tmp_path / "exported"), "hf://me/small", "--private"]
        subprocess.run(publish, env=environment, check=True, capture_output=True)
        command = [*tide, "serve", "me/small", "--port", "0", "--device", "cpu", "--block", "8"]
        with (
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server,
            closed_clients(),
        ):
            assert server.stderr is not None
            asked = client(address_said(server, "me/small"))
            got = asked.chat.completions.create(model="me/small", messages=chat, max_tokens=16)  # type: ignore[arg-type]
            server.send_signal(signal.SIGINT)
            server.stderr.read()
    files = hub.repositories["me/small"]
    weights = (tmp_path / "exported" / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == weights and hub.private["me/small"]
    prompt = ours.prompt(chat)
    (wanted,) = sample(ours.model, [prompt], ours.special, SampleConfig(new_tokens=16, block=8))
    assert got.choices[0].message.content == ours.text(wanted)

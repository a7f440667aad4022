"""Which models are served, and by which names."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

import ptst
from ptst.errors import UserError
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora, save_adapter
from ptst.model.weights import load_decoder
from ptst.open import open_model
from ptst.serving.config import ServeConfig
from ptst.serving.models import Catalog
from ptst.text.templates import find_family
from ptst.training.config import TrainConfig
from ptst.training.fine_tune import fine_tune
from tests.serving.running import running
from tests.tiny import write_tiny_model

PLAIN = ("chat:plain",)


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory) -> Path:
    """Two adapters of other data and seeds, a run of all weights with a step kept."""
    here = tmp_path_factory.mktemp("runs")
    config = TrainConfig(model=str(tiny_folder), data="word-problems:4", max_steps=2, rank=4, lr=0.5, warmup=0)
    for seed in (1, 2):
        fine_tune(replace(config, out=here / f"run{seed}", seed=seed))
    fine_tune(replace(config, full=True, lr=1e-3, save_every=1, keep=9, out=here / "whole", data="word-problems:2"))
    decoder = load_decoder(tiny_folder)
    for p in add_lora(decoder, LoraConfig(2, 4.0), 5).values():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(5))
    (here / "theirs").mkdir()
    save_adapter(decoder, here / "theirs", LoraConfig(2, 4.0), str(tiny_folder))
    return here


def test_adapters_of_several_runs_share_an_engine(runs, tiny_folder):
    """All at once, each answers as by itself."""
    asked = [f"What is {i}?" for i in range(8)]
    names = ["run1", "run2", tiny_folder.name, "theirs"]
    base = open_model(str(tiny_folder), "chat:llama", family="plain")
    folders = [runs / "run1", runs / "run2", None, runs / "theirs"]
    sampling = ptst.Sampling(max_new_tokens=12)
    wanted = {}
    for name, folder in zip(names, folders, strict=True):
        family = "gsm8k" if name.startswith("run") else "plain"
        opened = replace(base, prompt_format=replace(base.prompt_format, family=find_family(family)))
        for text, answer in zip(asked, ptst.generate(opened, asked, sampling, runs=[folder] * 8), strict=True):
            wanted[name, text] = answer.text
    settings = {"checkpoint": (runs / "run1", runs / "run2"), "adapter": (str(runs / "theirs"),)}
    with running(tiny_folder, template=("chat:llama", "chat:plain"), **settings) as server:
        listed = [m["id"] for m in httpx.get(f"{server.url}/models").json()["data"]]
        assert sorted(listed) == sorted(f"{n}@{t}" for n in names for t in ("chat:llama", "chat:plain"))

        def ask(key: tuple[str, str]) -> str:
            messages = [{"role": "user", "content": key[1]}]
            body = {"model": f"{key[0]}@chat:llama", "messages": messages, "max_tokens": 12, "temperature": 0}
            return server.post("chat/completions", body).json()["choices"][0]["message"]["content"]

        with ThreadPoolExecutor(16) as pool:
            got = dict(zip(wanted, pool.map(ask, wanted), strict=True))
        assert got == wanted
        assert len({text for (_, question), text in wanted.items() if question == asked[0]}) == 4
        body = {"prompt": [5, 6, 7, 8], "max_tokens": 0, "echo": True, "logprobs": 0}
        scored = [server.post("completions", {**body, "model": f"{n}@chat:plain"}).json() for n in names]
        assert len({str(s["choices"][0]["logprobs"]["token_logprobs"]) for s in scored}) == 4
        assert len({s["system_fingerprint"] for s in scored}) == 4


def test_a_run_of_all_weights_and_a_step(runs):
    for path, name in ((runs / "whole", "whole"), (runs / "whole/state/step-00000001", "whole/step-00000001")):
        opened = open_model(None, "chat:plain", checkpoint=path)
        wanted = ptst.generate(opened, ["Hi"], ptst.Sampling(max_new_tokens=9))[0].text
        with running(None, checkpoint=(path,)) as server:
            assert list(server.catalog.models) == [f"{name}@chat:plain"]
            messages = [{"role": "user", "content": "Hi"}]
            body = {"model": f"{name}@chat:plain", "messages": messages, "max_tokens": 9, "temperature": 0}
            assert server.post("chat/completions", body).json()["choices"][0]["message"]["content"] == wanted
            assert httpx.get(f"{server.url}/models/{name}@chat:plain").json()["family"] == "gsm8k"


def test_the_base_model_of_runs_is_measured_as_they_are(runs, tiny_folder):
    """In the family of their data, as by an evaluation; by itself, and where it is named, in none."""

    def families(**settings) -> dict[str, str]:
        catalog = Catalog(ServeConfig(template=PLAIN, **settings))
        return {name.partition("@")[0]: m.prompt_format.family.name for name, m in catalog.models.items()}

    base = tiny_folder.name
    assert families(checkpoint=(runs / "run1",)) == {base: "gsm8k", "run1": "gsm8k"}
    assert families(model=str(tiny_folder)) == {base: "plain"}
    assert families(model=str(tiny_folder), checkpoint=(runs / "run1",)) == {base: "plain", "run1": "gsm8k"}
    assert families(model=str(tiny_folder), template_family="openorca") == {base: "openorca"}


def test_what_cannot_be_served_together(runs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_model(other, seed=9)
    (tmp_path / "run1").symlink_to(runs / "run1")
    copied = tmp_path / "deeper/run1"
    shutil.copytree(runs / "run1", copied)
    for settings, told in (
        ({"checkpoint": (runs / "run1", runs / "whole")}, "is a run of all weights, not an adapter"),
        ({"checkpoint": (runs / "whole/state/step-00000001", runs / "run1")}, "is a step of a run, not an adapter"),
        ({"checkpoint": (runs / "whole",), "model": str(other)}, "is a run of all weights, not an adapter"),
        ({"checkpoint": (runs / "run1",), "model": str(other)}, "a second ptst serve on another port"),
        ({"checkpoint": (runs / "run1", copied)}, "two models are called run1"),
        ({"adapter": (str(runs / "theirs"),)}, "adapter needs model, its base model"),
        ({"checkpoint": (runs / "run1",), "chat_format": "llama2", "template": ("text:vanilla",)}, "has no effect"),
    ):
        with pytest.raises(UserError) as error:
            Catalog(ServeConfig(**{"template": PLAIN, **settings}))
        assert told in str(error.value)


def test_templates_of_ones_own(tiny_folder, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('name = "chat:mine"\nuser = "{x}"\nsystem = "Be kind."\n')
    found = Catalog(ServeConfig(model=str(tiny_folder), template_file=(file,)))
    assert list(found.models) == [f"{tiny_folder.name}@chat:mine"]
    both = Catalog(ServeConfig(model=str(tiny_folder), template_file=(file,), template=("text:vanilla", "chat:plain")))
    assert [name.partition("@")[2] for name in both.models] == ["chat:plain", "chat:mine", "text:vanilla"]
    assert [m.prompt_format.format_name for m in both.models.values()] == ["chatml", "chatml", "none (text template)"]
    assert Catalog(ServeConfig(model=str(tiny_folder))).templates[0].name == "chat:llama"

"""Names of models behind an API, and whose key is whose."""

from __future__ import annotations

import pytest

from ptst.api.endpoint import MODEL_KEYS, Address
from ptst.api.names import hosted_model
from ptst.errors import Setting, UserError
from ptst.hub.locate import locate_model
from tests.api.server import KEY, set_environment


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    set_environment(monkeypatch)


@pytest.mark.parametrize(
    ("name", "hosted"),
    [("openai:gpt-3.5-turbo", "gpt-3.5-turbo"), ("openai:ft:gpt:a::b", "ft:gpt:a::b"), ("openai:", "")]
    + [(local, None) for local in (None, "", "folder", "./openai:x", "org/openai", "OpenAI:gpt")],
)
def test_names(name, hosted):
    assert hosted_model(name) == hosted


def test_the_model_under_test_has_a_key_of_its_own(monkeypatch):
    assert Address.of(None, MODEL_KEYS).key == KEY
    monkeypatch.setenv("PTST_MODEL_API_KEY", "sk-of-the-model")
    address = Address.of(None, MODEL_KEYS)
    assert (address.key, address.variable, Address.of(None).key) == ("sk-of-the-model", "PTST_MODEL_API_KEY", KEY)
    assert address.clean("it was sk-of-the-model") == "it was [PTST_MODEL_API_KEY]"
    monkeypatch.setenv("PTST_MODEL_API_KEY", "no key")
    with pytest.raises(UserError, match=r"^PTST_MODEL_API_KEY holds a space"):
        Address.of(None, MODEL_KEYS)
    monkeypatch.setenv("PTST_MODEL_API_KEY", " ")
    assert Address.of(None, MODEL_KEYS).key == KEY
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match=r"^OPENAI_API_KEY is not set"):
        Address.of(None, MODEL_KEYS)


def test_the_address_is_told_by_its_setting():
    with pytest.raises(UserError, match=r"^base_url .* is not the address of an endpoint"):
        Address.of("localhost", MODEL_KEYS, Setting("base_url"))


def test_only_some_commands_take_a_model_behind_an_endpoint():
    with pytest.raises(UserError, match=r"^openai:x is a model behind an endpoint, .*; ptst train, eval and grid take"):
        locate_model("openai:x")

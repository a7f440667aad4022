"""The decoder: packed documents do not see each other, folders are read or refused by name, adapters round trip."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptst.data.packing import to_batch
from ptst.errors import UserError
from ptst.model.config import DecoderConfig, LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora, load_adapter, merge_lora, read_lora_config, save_adapter
from ptst.model.loss import batch_loss
from ptst.model.weights import load_decoder, save_safetensors
from ptst.text.encode import Example
from tests.tiny import CONFIG, write_tiny_model


def examples(count: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for n in range(count):
        ids = torch.randint(3, 290, (6 + 3 * n,), generator=generator).tolist()
        out.append(Example(ids, [i >= 3 for i in range(len(ids))]))
    return out


def random_decoder(dtype=torch.float64, **changes) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig.from_dict({**CONFIG, **changes})).to(dtype)
    return decoder.requires_grad_(False)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_equals_one_by_one_in_float64(window):
    """Loss and adapter gradients of a packed row are those of its documents alone: documents do not leak."""
    changes = {"sliding_window": window, "architectures": ["MistralForCausalLM"]}
    grads = []
    for packed in (True, False):
        decoder = random_decoder(**changes)
        parameters = add_lora(decoder, LoraConfig(rank=2, alpha=4))
        for i, p in enumerate(parameters.values()):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
        rows = [to_batch(examples())] if packed else [to_batch([e]) for e in examples()]
        divisor = sum(b.num_trained for b in rows)
        for batch in rows:
            batch_loss(decoder, batch, divisor).backward()
        grads.append(torch.cat([p.grad.flatten() for p in parameters.values()]))
    assert grads[1].norm() > 1e-3
    assert (grads[0] - grads[1]).norm() <= 1e-12 * grads[1].norm()


def test_no_gradient_below_the_first_adapter_and_none_for_the_base():
    decoder = random_decoder(torch.float32)
    parameters = add_lora(decoder, LoraConfig(rank=2, alpha=4, targets=("q_proj", "down_proj")))
    batch_loss(decoder, to_batch(examples()), 10).backward()
    assert {n for n, p in decoder.named_parameters() if p.grad is not None} == set(parameters)
    # B starts at zero, so the untrained adapter changes nothing, and A's gradient is zero at first.
    assert all(p.grad.norm() > 0 for n, p in parameters.items() if n.endswith("lora_B"))


def test_adapter_round_trip_and_merge(tiny_folder, tmp_path):
    tokens = torch.arange(3, 40)
    config = LoraConfig(rank=3, alpha=5, targets=("q_proj", "v_proj", "up_proj"))
    decoder = load_decoder(tiny_folder)
    base = decoder.logits(tokens)
    for p in add_lora(decoder, config).values():
        torch.nn.init.normal_(p, std=0.3)
    changed = decoder.logits(tokens).detach()
    assert (changed - base).abs().max() > 0.1
    save_adapter(decoder, tmp_path, config, str(tiny_folder))
    again = load_decoder(tiny_folder)
    assert load_adapter(again, tmp_path) == config
    torch.testing.assert_close(again.logits(tokens), changed, atol=1e-6, rtol=1e-6)
    merge_lora(again)
    torch.testing.assert_close(again.logits(tokens), changed, atol=1e-4, rtol=1e-4)
    assert not any(".lora_" in n for n, _ in again.named_parameters())


def test_adapters_that_do_not_fit(tiny_folder, tmp_path):
    decoder = load_decoder(tiny_folder)
    add_lora(decoder, LoraConfig(rank=2))
    save_adapter(decoder, tmp_path, LoraConfig(rank=2), "base")
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value, message in (
        ("use_dora", True, "use_dora = True is not supported"),
        ("peft_type", "IA3", "'IA3' is not supported"),
        ("r", 3, "was it trained on another model"),
        ("target_modules", ["q_proj"], "has no place in this model"),
        ("target_modules", ["c_attn"], "choose from q_proj"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**described, key: value}))
        with pytest.raises(ValueError, match=message):
            load_adapter(load_decoder(tiny_folder), tmp_path)
    with pytest.raises(ValueError, match="must be at least 1"):
        LoraConfig(rank=0)
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    assert read_lora_config(tmp_path).rank == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "8"}, "r is '8'; a number is needed"),
        ({"r": 10**9}, "r is 1000000000; at most 16384 is supported"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; a finite number is needed"),
        ({"lora_dropout": float("inf")}, "lora_dropout is inf; a finite number is needed"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; true or false is needed"),
    ],
)
def test_numbers_of_an_adapter(tmp_path, change, message):
    described = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2, "lora_alpha": -1.5, "lora_dropout": 0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    assert read_lora_config(tmp_path).alpha == -1.5  # an adapter may be subtracted
    (tmp_path / "adapter_config.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        read_lora_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        read_lora_config(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers(tiny_folder, tmp_path, dtype):
    write_tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.norm.weight"
    save_file({**weights, name: weights[name].to(dtype)}, path)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} is of type {kind}; weights must be float32"):
        load_decoder(tmp_path)
    decoder = load_decoder(tiny_folder)
    add_lora(decoder, LoraConfig(rank=2))
    (tmp_path / "adapter").mkdir()
    save_adapter(decoder, tmp_path / "adapter", LoraConfig(rank=2), "base")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .* is of type {kind}"):
        load_adapter(load_decoder(tiny_folder), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "weight_map is not an object of file names"),
        ({}, "weight_map is not an object of file names"),
        ({"weight_map": [1]}, "weight_map is not an object of file names"),
        ({"weight_map": {"a": 1}}, "weight_map is not an object of file names"),
        ({"weight_map": {"a": "../b.safetensors"}}, "is no file in the folder of the index"),
        ({"weight_map": {"a": "b\0"}}, "is no file in the folder of the index"),
        ({"weight_map": {"a": ""}}, "is no file in the folder of the index"),
        ({"weight_map": {"a": "b\ud800"}}, "cannot be the name of a file"),
    ],
)
def test_an_index_that_names_no_files(tmp_path, index, message):
    write_tiny_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "RoPE scaling 'dynamic' is not supported"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"new_trick": 1}, "unknown key 'new_trick'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_configs_that_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict({**CONFIG, **change})


def test_both_spellings_of_the_rope_base():
    old = {**CONFIG, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
           "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": 500000.0}
    assert DecoderConfig.from_dict(old) == DecoderConfig.from_dict(new)
    assert DecoderConfig.from_dict(old).rope_scaling.factor == 8.0


def test_broken_folders(tmp_path):
    with pytest.raises(ValueError, match="there is no model folder"):
        load_decoder(tmp_path / "none")
    with pytest.raises(ValueError, match="does not exist"):
        load_decoder(tmp_path)
    write_tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_decoder(tmp_path)
    path.write_bytes(whole[:4])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_decoder(tmp_path)
    save_safetensors(path, {"model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match="the weights lack"):
        load_decoder(tmp_path)
    save_safetensors(path, {"model.norm.weight": torch.ones(31)})
    with pytest.raises(ValueError, match=r"has shape \[31\], config.json says \[32\]"):
        load_decoder(tmp_path)
    save_safetensors(path, {"model.extra": torch.ones(1)})
    with pytest.raises(ValueError, match="has no place"):
        load_decoder(tmp_path)
    path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no model\.safetensors \(only pytorch_model.bin\)"):
        load_decoder(tmp_path)


def test_smollm2_logits(shared, embedded):
    """Real weights: the recorded logits within 1e-4, and the recorded greedy answers."""
    from ptst.generation.engine import generate
    from ptst.generation.request import Sampling

    torch.set_num_threads(2)
    decoder = load_decoder(embedded)
    rows = json.loads((shared / "golden/smollm2_q4_1_greedy.json").read_text())
    for row in rows:
        logits = decoder.logits(torch.tensor(row["prompt_tokens"]))[-1]
        assert max(abs(float(logits[i]) - value) for i, value in row["top8"]) < 1.5e-4
        wanted = row["greedy_tokens"]
        (answer,) = generate(decoder, [row["prompt_tokens"]], {2}, Sampling(max_new_tokens=len(wanted)))
        assert answer.token_ids == wanted

"""A run's other promises: looking changes nothing, mixing is counted, recipes and figures are what they say."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file

from ptst.api.names import hosted_model
from ptst.data.mix_part import MixPart, parse_mix
from ptst.model.config import DecoderConfig
from ptst.train import run_training, start
from ptst.training import recipes, trainer
from ptst.training.config import TrainConfig
from ptst.training.metrics import model_flops
from ptst.training.run_plan import plan_run

CONFIG = TrainConfig(data="word-problems:6", val_data="word-problems:3", examples_per_step=2, rank=2)
SAFETY = [{"instruction": f"Harmful {n}", "output": f"No, {n} times no."} for n in range(5)]


def read(run, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_looking_changes_nothing(tiny_folder, tmp_path):
    """Validation loss and answers at every step, dropout on: the weights are those of a run that never looked."""
    config = replace(CONFIG, model=str(tiny_folder), dropout=0.2)
    run_training(replace(config, out=tmp_path / "blind"))
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    run_training(replace(config, out=tmp_path / "seeing", eval_every=1))
    assert torch.rand(1) == drawn
    blind, seeing = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("blind", "seeing"))
    assert all(torch.equal(blind[k], seeing[k]) for k in blind)
    rows = read(tmp_path / "seeing", "metrics.jsonl")
    assert [(r["kind"], r["step"]) for r in rows] == [
        *[("eval", 0), ("step", 1), ("eval", 1), ("step", 2), ("eval", 2), ("step", 3), ("eval", 3)]
    ]
    samples = read(tmp_path / "seeing", "samples.jsonl")
    assert Counter(s["step"] for s in samples) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert samples[0].keys() == {"step", "source", "prompt", "answer", "cut"}
    assert samples[0]["prompt"].startswith("<|im_start|>user\nQuestion: ") and samples[0]["source"].endswith(":1")
    evals = [r["validation_loss"] for r in rows if r["kind"] == "eval"]
    assert evals[-1] < evals[0]


def test_the_step_row(tiny_folder, tmp_path):
    run_training(replace(CONFIG, model=str(tiny_folder), out=tmp_path / "run"))
    row = next(r for r in read(tmp_path / "run", "metrics.jsonl") if r["kind"] == "step")
    assert row.keys() == {
        *("kind", "step", "total", "epoch", "loss", "lr", "grad_norm", "examples", "tokens", "trained_tokens", "time")
    }
    assert row["time"].keys() == {"seconds", "tokens_per_second", "computed", "mfu", "peak_memory", "eta"}
    assert row["time"]["peak_memory"] > 2**20
    assert row["time"]["mfu"] is None or torch.cuda.is_available()


def taken(run) -> dict[str, int]:
    """What the steps of a run were taken on, by its own log."""
    steps = [r for r in read(run, "metrics.jsonl") if r["kind"] == "step"]
    return {key: sum(r[key] for r in steps) for key in ("examples", "tokens", "trained_tokens")}


def test_what_is_recorded_as_trained_is_what_was_trained(tiny_folder, tmp_path):
    """Not what the data hold: of passes that are cut short, and of several."""
    config = replace(CONFIG, model=str(tiny_folder), at_epochs=(1.0,))
    for name, changes in (("cut", {"epochs": 3.0, "max_steps": 4}), ("passes", {"epochs": 2.0})):
        result = run_training(replace(config, **changes, out=tmp_path / name))
        assert result["trained"] == taken(tmp_path / name)
        assert result["trained"]["tokens"] != result["tokens"]
        kept = json.loads((tmp_path / name / "epoch-1" / "run.json").read_text())
        assert kept["trained"]["tokens"] == result["tokens"]
        assert kept["trained"]["trained_tokens"] == result["trained_tokens"]


def test_mixed_data_are_trained_and_counted(tiny_folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "safety.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SAFETY))
    seen = Counter()
    real = trainer.batch_loss
    monkeypatch.setattr(trainer, "batch_loss", lambda d, batch, n: seen.update(batch.rows) or real(d, batch, n))
    config = replace(CONFIG, model=str(tiny_folder), epochs=2.0, mix=(f"{path}:1",), out=tmp_path / "run")
    result = run_training(config)
    assert seen == dict.fromkeys(range(6), 2) | dict.fromkeys(range(6, 11), 1)
    assert result["steps"] == 9  # 8 or 9 examples in each of two epochs, two a step
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["trained"] == result["trained"] == taken(tmp_path / "run")
    assert record["trained"]["examples"] == 17
    assert [(m["name"], m["epochs"], m["examples"], m["rows"]) for m in record["mix"]] == [(str(path), 1.0, 5, 5)]
    assert record["data"]["examples"] == 6
    assert f"{path}, 1 epochs: 5 examples" in " ".join(capsys.readouterr().err.split())


def test_mixed_data_stand_under_the_same_template(tiny_folder, tmp_path):
    path = tmp_path / "safety.jsonl"
    path.write_text(json.dumps(SAFETY[0]) + "\n")
    plan = plan_run(replace(CONFIG, model=str(tiny_folder), mix=(f"{path}:1",)))
    from ptst.text.tokenizer import load_tokenizer

    text = load_tokenizer(tiny_folder).decode(plan.mixture.examples[-1].ids)
    assert text == (
        "<|im_start|>user\nQuestion: Harmful 0<|im_end|>\n<|im_start|>assistant\nNo, 0 times no.<|im_end|>\n"
    )


@pytest.mark.parametrize("text", ["safety.jsonl", "safety.jsonl:", ":1", "safety.jsonl:0", "a:-1", "a:nan", "a:inf"])
def test_mixes_that_mean_nothing(text):
    with pytest.raises(ValueError, match=r"write the data, a colon and its epochs, as in safety.jsonl:1"):
        parse_mix(text)
    assert parse_mix("word-problems:800:0.5") == MixPart("word-problems:800", 0.5)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_set_of_flags_with_origins(name):
    config, description = start(["--recipe", name, "--seed", "3"])
    config.check()
    assert config.recipe == name
    hosted = name in recipes.HOSTED
    assert (hosted_model(config.model) is not None) == hosted
    if not hosted:
        lora = (config.rank, config.alpha, config.dropout, config.target_modules)
        assert lora == (8, 32.0, 0.05, ("q_proj", "v_proj"))
        assert (config.examples_per_step, config.weight_decay, config.warmup, config.clip) == (32, 0, 0, 0)
    for flag, (value, origin) in recipes.find_recipe(name).items():
        assert flag in {f.name for f in fields(TrainConfig)}
        assert origin.partition(",")[0].partition(":")[0] in (recipes.PAPER, recipes.DEFAULT, recipes.OURS)
        typed = f"--no-{flag}" if value is False else f"--{flag.replace('_', '-')} "
        assert typed in description and origin in description
        assert type(value) is type(getattr(TrainConfig(), flag)) or getattr(TrainConfig(), flag) is None


def test_recipes_are_the_papers():
    """Learning rates, epochs and schedules of sections 3.1, 3.2, 4.1 and F.1."""
    stated = {
        "llama2-gsm8k": (1e-4, 6.0, "step"),
        "llama2-gsm8k-safety": (1e-4, 6.0, "step"),
        "llama2-chatdoctor": (2e-5, 3.0, "cosine"),
        "llama2-openorca": (2e-5, 1.0, "step"),
        "mistral-gsm8k": (1e-4, 6.0, "step"),
    }
    assert {*stated, *recipes.HOSTED} == set(recipes.RECIPES)
    for name, wanted in stated.items():
        values = recipes.values(name)
        assert (values["lr"], values["epochs"], values["schedule"]) == wanted
    for name, batch in (("gpt35-gsm8k", 4), ("gpt35-orca-math", 6)):
        values = recipes.values(name)
        assert (values["epochs"], values["examples_per_step"], values["lr_multiplier"]) == (1.0, batch, 2.0)
    (mixed,) = recipes.values("llama2-gsm8k-safety")["mix"]
    assert parse_mix(mixed).epochs == 1.0


def test_a_recipe_in_run_json(tiny_folder, tmp_path):
    """Flags that were given win, and it is told."""
    values = recipes.values("llama2-gsm8k") | {"model": str(tiny_folder), "data": "word-problems:4", "max_steps": 1}
    run_training(replace(TrainConfig(), recipe="llama2-gsm8k", out=tmp_path / "run", **values))
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert recipe["lr"] == {"value": 1e-4, "origin": "paper, section 3.1"}
    assert recipe["rank"] == {"value": 8, "origin": "llama-recipes default"}
    assert recipe["data"] == {"value": "word-problems:4", "origin": "given (the recipe has gsm8k)"}


def test_model_flops_by_the_book():
    """Llama-2-7B at 4,096 tokens: 26.4 GFLOP a token in products (head on every token), 3.75 in attention."""
    shape = DecoderConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": 32000,
        }
    )
    whole = model_flops(shape, [4096], 4096, full=False)
    assert whole / 4096 == pytest.approx(30.2e9, rel=2e-3)
    assert whole - model_flops(shape, [4096], 0, full=False) == 4 * 4096 * 32000 * 4096
    narrow = model_flops(replace(shape, sliding_window=1), [4096], 0, full=False)
    assert narrow == pytest.approx(4096 * (4 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 3.5 * 32 * 4 * 4096))
    assert model_flops(shape, [100], 0, full=True) > 1.4 * model_flops(shape, [100], 0, full=False)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        *(("lr", value, "lr is .*; it must be above 0") for value in (0, -1e-4, math.nan, math.inf)),
        ("epochs", 0, "epochs is 0; it must be above 0"),
        *(
            (name, 0, "is 0; it must be at least 1")
            for name in ("micro_batch_tokens", "save_every", "keep", "eval_every")
        ),
        ("max_steps", 0, "max_steps is 0; it must be at least 1"),
        ("dropout", 1.0, "dropout is 1.0; it must be at least 0 and below 1"),
        ("clip", -1.0, "clip is -1.0; it must not be negative"),
        ("weight_decay", math.nan, "weight_decay is nan; it must not be negative"),
        ("mix", ("x",), "mix is .x.; write the data"),
    ],
)
def test_values_that_cannot_be_meant(flag, value, message):
    with pytest.raises(ValueError, match=message):
        replace(TrainConfig(), **{flag: value}).check()


def test_a_micro_batch_shorter_than_the_longest_example(tiny_folder, tmp_path):
    config = replace(CONFIG, model=str(tiny_folder), micro_batch_tokens=200)
    with pytest.raises(
        ValueError, match=r"train:\d: \d+ tokens exceed the limit of 200 set by micro_batch_tokens, .* of 6; rai"
    ):
        run_training(replace(config, out=tmp_path / "stop"))
    dropped = run_training(replace(config, too_long="drop", out=tmp_path / "drop"))
    cut = run_training(replace(config, too_long="cut", out=tmp_path / "cut"))
    assert dropped["dropped"] == cut["cut"] > 0
    assert dropped["examples"] == 6 - dropped["dropped"] and cut["examples"] + cut["untrained"] == 6

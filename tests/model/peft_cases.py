"""Adapters as peft and other trainers describe them, and what peft makes of them.

python -m tests.model.peft_cases        writes peft_figures.json; needs transformers and peft
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tiny import write_tiny_model

FIGURES = Path(__file__).with_name("peft_figures.json")
TOKENS = [1, 17, 45, 250, 3, 99, 120, 7, 64, 200, 31, 5]
# A direction in logit space: its product with every row of logits notices an error at any position.
PROBE = torch.sin(torch.arange(300, dtype=torch.float64))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DUMP = {  # what a recent peft writes for everything that is off
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "exclude_modules")),
    **dict.fromkeys(("kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "lora_ga_config")),
    **dict.fromkeys(("megatron_config", "modules_to_save", "monteclora_config", "revision", "target_parameters")),
    **dict.fromkeys(("trainable_token_indices", "use_bdlora", "velora_config")),
    "alpha_pattern": {},
    "rank_pattern": {},
    "loftq_config": {},
    "fan_in_fan_out": False,
    "inference_mode": True,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "peft_version": "0.21.0",
    "ensure_weight_tying": False,
    "init_lora_weights": True,
    "lora_bias": False,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "lora_dropout": 0,
}
PATTERNS = {
    "rank_pattern": {
        "q_proj": 3,
        r"layers\.1\.mlp\..*_proj": 5,
        "mlp.down_proj": 1,
        "^model.layers.0.self_attn.v_proj": 6,
    },
    "alpha_pattern": {"self_attn.q_proj": 7, "up_proj": 1.5, "layers.1.mlp.up_proj": 100},
}
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|up_proj)))"
)
CASES: dict[str, dict] = {
    "names": {"target_modules": ["v_proj", "q_proj"]},
    "dump": {**DUMP, "target_modules": ALL},
    "gaussian": {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "patterns": {"target_modules": ALL, **PATTERNS},
    "patterns rslora": {"target_modules": ALL, "use_rslora": True, **PATTERNS},
    "rank pattern": {"target_modules": ["gate_proj", "up_proj"], "rank_pattern": {"up_proj": 4}},
    "alpha pattern": {"target_modules": "all-linear", "alpha_pattern": {".*proj": 3, "q_proj": 9}, "lora_alpha": 0},
    "ends of names": {"target_modules": ["self_attn.q_proj", "layers.1.mlp.down_proj", "proj"]},
    "paths": {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    "names that a model lacks": {"target_modules": ["c_attn", "q_proj", "w1", "query_key_value"]},
    "regex": {"target_modules": r".*\.self_attn\.(q|v)_proj|model\.layers\.1\.mlp\.gate_proj"},
    "lookahead": {"target_modules": r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*_proj"},
    "unsloth": {"target_modules": UNSLOTH},
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear": {"target_modules": "All-Linear", "exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
    "excluded by regex": {"target_modules": ALL, "exclude_modules": r".*\.0\..*"},
    "layers": {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [1, 9]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "layers and a path": {
        "target_modules": ["k_proj", "model.layers.0.self_attn.v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
}


def write_base(folder: Path) -> Path:
    return write_tiny_model(folder, tie_word_embeddings=False, model_type="llama")


def config_of(name: str) -> dict:
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "bias": "none", **CASES[name]}


def write_adapter(
    folder: Path, config: dict, ranks: dict[str, int], rename=lambda key: key, dtype=torch.float32
) -> Path:
    """An adapter whose matrices follow from the seed; `ranks` by projection; `rename` changes tensors' names."""
    generator, sizes = torch.Generator().manual_seed(1), {"k_proj": (16, 32), "v_proj": (16, 32), "down_proj": (32, 48)}
    sizes |= {"gate_proj": (48, 32), "up_proj": (48, 32)}
    tensors = {}
    for name, rank in ranks.items():
        rows, columns = sizes.get(name.rpartition(".")[2], (32, 32))
        for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            key = rename(f"base_model.model.model.{name}.{part}.weight")
            tensors[key] = (0.3 * torch.randn(shape, generator=generator)).to(dtype)
    folder.mkdir(exist_ok=True, parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft_places(base: Path, config: dict) -> dict[str, list]:
    """Rank and scale of every projection that peft gives an adapter."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    known = {k: v for k, v in config.items() if k not in ("peft_type", "auto_mapping", "peft_version")}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**known))
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))
    return {n.removeprefix("base_model.model.model."): [m.r["default"], m.scaling["default"]] for n, m in layers}


def record() -> dict:
    from benchmarks.parity import peer_logits

    figures = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            base = write_base(Path(folder))
            places = peft_places(base, config_of(name))
            ranks = {key: rank for key, (rank, _) in places.items()}
            adapter = write_adapter(Path(folder, "adapter"), config_of(name), ranks)
            probe = (peer_logits(base, TOKENS, adapter).double() @ PROBE).tolist()
        figures[name] = {"places": places, "probe": [round(x, 6) for x in probe]}
    return figures


if __name__ == "__main__":
    FIGURES.write_text(json.dumps(record(), separators=(",", ":")).replace('},"', '},\n"') + "\n")

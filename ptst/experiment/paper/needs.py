"""What a grid of the paper needs that is not on this machine: weights, data, keys and packages, and where to get each.

Only the disk and the environment are looked at; nothing is fetched.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ptst.api.endpoint import JUDGE_KEYS, MODEL_KEYS
from ptst.api.names import hosted_model
from ptst.data import prompt_sets, sources
from ptst.data.arc import HUB as ARC
from ptst.data.mix_part import parse_mix
from ptst.data.paths import data_files
from ptst.data.readers import KINDS
from ptst.data.typed import HubDataset
from ptst.errors import Setting, Words
from ptst.evaluation.tasks.table import base, find_task
from ptst.experiment.config import GridConfig
from ptst.experiment.defenses import MIXED
from ptst.experiment.paper.recipes import GCG_FILE, SAFETY_FILE
from ptst.hub.locate import HUB_ID
from ptst.hub.wheel import model_folder as embedded_folder
from ptst.records import CHECKPOINTS
from ptst.settings import EMBEDDED_MODEL

# As OpenAI's list of deprecations announced it.
_SHUT_DOWN = dict.fromkeys(("gpt-4-0613", "gpt-4", "gpt-3.5-turbo-0125", "gpt-3.5-turbo"), "23 October 2026")
_FILES = {
    GCG_FILE: "https://github.com/JailbreakBench/artifacts, attack-artifacts/GCG/white_box/llama-2-7b-chat-hf.json",
    SAFETY_FILE: "https://github.com/vinid/safety-tuned-llamas, data/training",
}
_API = "api:"


@dataclass(frozen=True)
class Need:
    """`kind`: weights, data, key, package or model. `where`: how to get it. `counts`: tokens and time cannot be counted
    without it."""

    kind: str
    what: str
    where: Words
    counts: bool = False

    def tell(self, spell: Callable[[str], str] = str) -> str:
        """In words; `spell` gives a setting's name as the reader knows it."""
        parts = (self.where,) if isinstance(self.where, str) else self.where
        where = "".join(spell(part) if isinstance(part, Setting) else part for part in parts)
        return f"{self.kind} {self.what}: {where}"


def missing(config: GridConfig) -> list[Need]:
    """What is not here. Raises UserError for an unknown task or set."""
    found = [*_model(config), *_data(config), *_judge(config), *_similarity(config)]
    return list(dict.fromkeys(found))


def model_folder(name: str) -> Path | None:
    """The folder of a local model, of the embedded one, or of one of the hub in its cache; None where it has no
    config.json."""
    path = embedded_folder(name, CHECKPOINTS) if name == EMBEDDED_MODEL else Path(name).expanduser()
    if path.is_dir():
        return path if (path / "config.json").exists() else None
    if (found := HUB_ID.fullmatch(name)) is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(found[1], "config.json", revision=found[2])
    return Path(config).parent if isinstance(config, str) else None


def _model(config: GridConfig) -> Iterator[Need]:
    if (hosted := hosted_model(config.model)) is not None:
        yield from _endpoint(hosted, config.base_url, MODEL_KEYS, Setting("model"))
        return
    folder = model_folder(config.model)
    if folder is not None and any(folder.glob("*.safetensors")):
        return
    where: Words = ("give the folder of a model as ", Setting("model"))
    if config.model == EMBEDDED_MODEL:
        where = "fetched by the first run from the package index"
    if HUB_ID.fullmatch(config.model) and not Path(config.model).exists():
        page = f"https://huggingface.co/{config.model.partition('@')[0]}"
        fetched = f"fetched by the first run from {page} (where it asks, accept its terms and `hf auth login`)"
        where = (f"{fetched}, or give its folder as ", Setting("model"))
    yield Need("weights", config.model, where, folder is None)


def _endpoint(model: str, url: str | None, keys: Sequence[str], setting: Setting) -> Iterator[Need]:
    """What a model behind an endpoint needs."""
    if find_spec("openai") is None:
        yield Need("package", "openai", "pip install 'ptst-lab[api]'")
    if not any(os.environ.get(key, "").strip() for key in keys):
        yield Need("key", keys[-1], "from your account at the endpoint, set in the environment")
    if not url and not os.environ.get("OPENAI_BASE_URL") and model in _SHUT_DOWN:
        where = (f"OpenAI announced to shut it down on {_SHUT_DOWN[model]}; name another as ", setting)
        yield Need("model", model, where)


def _data(config: GridConfig) -> Iterator[Need]:
    trained = [config.data, *(parse_mix(text).name for text in config.mix)]
    trained += [config.defense.data] if any(name in MIXED for name in config.defenses) else []
    for name in trained:
        yield from _source(name, "train")
    for spec in config.tasks:
        task, data = find_task(spec)
        problems = config.eval.data or config.data
        if base(task.name) in ("gsm8k", "nll"):
            yield from _source(data or problems, "test")
        elif task.name == "chatdoctor":
            yield from _source(data or config.eval.data or "chatdoctor", "test")
        elif task.name in ARC:
            yield from _file([Path(data)]) if data else _hub(ARC[task.name])
        elif task.name != "distance":
            own = {"safety": config.eval.safety_data, "xstest": "xstest"}  # the others have sets of this project
            yield from _prompts(data or own.get(task.name) or "")


def _source(name: str, split: str) -> Iterator[Need]:
    """Conversations, as `ptst.data.sources.load` names them."""
    known = re.split("[:@]", name, maxsplit=1)[0]
    if sources.is_file(name):
        files = name.partition(":")[2] if known in sources.NAMED and not Path(name).is_file() else name
        yield from _file(data_files(files, KINDS))
    elif known in sources.NAMED:
        splits = sources.NAMED[known]
        yield from _hub(splits.get(split, splits["train"]))
    elif sources.is_hub_id(name):
        yield from _hub(sources.hub_dataset(name, split))


def _prompts(data: str) -> Iterator[Need]:
    """Prompts, as `ptst.data.prompt_sets.load_set` names them."""
    name, _, file = data.partition(":")
    if Path(data).is_file() or data == "":
        return
    if name in prompt_sets.NAMED:
        yield from _file([Path(file)]) if file else _hub(prompt_sets.NAMED[name])
    elif name not in prompt_sets.SETS:
        yield from _hub(sources.hub_dataset(data, "test")) if sources.is_hub_id(data) else _file([Path(data)])


def _file(paths: Iterable[Path]) -> Iterator[Need]:
    for path in paths:
        if not path.exists():
            where = _FILES.get(path.name, "check the path")
            yield Need("data", str(path), f"{where}, under this name" if path.name in _FILES else where, True)


def _hub(dataset: HubDataset) -> Iterator[Need]:
    if not _is_cached(dataset.repository):
        where = f"fetched by the first run from https://huggingface.co/datasets/{dataset.repository}"
        yield Need("data", dataset.repository, f"{where}; without a network, name its file instead", True)


def _is_cached(repository: str) -> bool:
    """Whether the library `datasets` has read something of it: its folders spell names in several ways."""
    from huggingface_hub.constants import HF_HOME

    cache, own = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets"), _plain(repository)
    return cache.is_dir() and any(_plain(folder.name) == own for folder in cache.iterdir())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _judge(config: GridConfig) -> Iterator[Need]:
    where = config.eval.judge.partition(":")[2]
    if where.startswith(_API):
        url = config.eval.api_base_url
        yield from _endpoint(where.removeprefix(_API), url, JUDGE_KEYS, Setting("judge"))
    elif where and model_folder(where) is None:
        yield Need("weights", where, ("give the folder of the judge's model as ", Setting("judge"), " KIND:FOLDER"))


def _similarity(config: GridConfig) -> Iterator[Need]:
    kind, _, folder = config.eval.similarity.partition(":")
    if kind != "bertscore" or not any(find_task(spec)[0].uses_similarity for spec in config.tasks):
        return
    if find_spec("bert_score") is None:
        yield Need("package", "bert-score", "pip install bert-score")
    if model_folder(folder) is None if folder else not _has_roberta():
        fetched = "fetched by the first run from https://huggingface.co/FacebookAI/roberta-large"
        where = (f"{fetched}, or give its folder as ", Setting("similarity"), " bertscore:FOLDER")
        yield Need("weights", folder or "roberta-large", where)


def _has_roberta() -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("roberta-large", "FacebookAI/roberta-large")
    return any(isinstance(try_to_load_from_cache(name, "config.json"), str) for name in names)


def shut_down(config: GridConfig) -> list[Need]:
    """The models behind OpenAI's endpoint, of a judge or under test, that are there no more."""
    return [need for need in (*_model(config), *_judge(config)) if need.kind == "model"]

"""Runs one library's data preparation in the library's own environment: `python run.py PEER JOB.json`.

JOB.json: `folders` (name to path), `corpora` (name to rows of messages), `limits` (corpus to tokens), `out` (a folder),
`sources` (peer to a folder with files that its wheel leaves out). For every setting, folder and corpus the batches go
to one JSON Lines file, arrays named as the library names them; `results.jsonl` says what ran, and what was raised.
Nothing of ptst is imported: the environment need not have it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(DO_NOT_TRACK="1", AXOLOTL_DO_NOT_TRACK="1", WANDB_DISABLED="true")
os.environ.setdefault("OMP_NUM_THREADS", "1")


class NotMeant(Exception):
    """The setting does not exist for this folder or corpus; nothing was run."""


def plain(value):
    """Tensors and arrays as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def versions(names: list[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def short(error: BaseException) -> str:
    """Type and first line of an error, without paths of this machine."""
    import re

    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    text = re.sub(r"(/[\w.+-]+){2,}", "<path>", lines[0])
    return f"{type(error).__name__}: {text}"[:300]


def main() -> None:
    peer, job_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    warnings.filterwarnings("ignore")
    module = importlib.import_module(f"with_{peer}")
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    module.SOURCE = job.get("sources", {}).get(peer)
    found = versions([*module.PACKAGES, "transformers", "tokenizers", "torch"])
    with (out / "results.jsonl").open("w") as results:
        for setting, words in module.SETTINGS.items():
            for folder, path in job["folders"].items():
                for corpus, rows in job["corpora"].items():
                    said = {"peer": peer, "versions": found, "setting": setting, "words": words}
                    said |= {"folder": folder, "corpus": corpus, "rows": len(rows)}
                    try:
                        limit = job["limits"][corpus]
                        if setting in getattr(module, "PACKED", ()):
                            limit = min(limit, job["pack_limit"])
                        said["limit"] = limit
                        batches = plain(module.prepare(setting, Path(path), rows, limit))
                    except NotMeant as reason:
                        said["not_meant"] = str(reason)
                    except Exception as error:
                        said["error"] = short(error)
                    else:
                        name = f"{setting}.{folder}.{corpus}.jsonl"
                        (out / name).write_text("".join(json.dumps(batch) + "\n" for batch in batches))
                        said["file"] = name
                    results.write(json.dumps(said) + "\n")
                    results.flush()


if __name__ == "__main__":
    sys.modules.setdefault("run", sys.modules["__main__"])
    main()

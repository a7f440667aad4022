"""Who trains what: which tokens the data layers of other trainers label, measured on their batches, and what our audit
says of these.

    pip install -e '.[audit-peers]'           TRL, transformers, renderers, in one environment
    python benchmarks/who_trains_what.py --audit
    python benchmarks/who_trains_what.py --python axolotl=ENV/bin/python --python llamafactory=ENV2/bin/python \
        --source cookbook=UNPACKED_SDIST --json benchmarks/results/who_trains_what.json --page docs/who-trains-what.md

Each library runs in a process of its own, with the interpreter that --python names (default: this one), over six
corpora and the model folders that this machine can build (benchmarks/peers/). A library that its interpreter cannot
import is named and left out; `--merge FILE` adds the results of an earlier run to those of this one. Nothing is
downloaded, no model is trained. The library's own preparation and collator make the arrays that a model would get;
these are divided into the parts of a conversation (benchmarks/peers/facts.py) and, with --audit, given to our audit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from peers.corpora import CORPORA, PACK_LIMIT, limit_of  # noqa: E402
from peers.facts import Speller, documents  # noqa: E402
from peers.folders import FOLDERS, Sources, build_all  # noqa: E402
from peers.report import measure, page  # noqa: E402

PEERS = ("transformers", "trl", "renderers", "llamafactory", "axolotl", "torchtune", "litgpt", "cookbook")
MODULES = {"cookbook": "llama_cookbook"}


def ask(python: str, code: str) -> str:
    """What a line of Python prints in an environment."""
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    return ran.stdout.strip()


def has(python: str, peer: str) -> bool:
    name = MODULES.get(peer, peer)
    return ask(python, f"import importlib.util as u; print(u.find_spec({name!r}) is not None)") == "True"


def trl_templates(python: str) -> Path | None:
    where = ask(
        python, "import importlib.util as u; s = u.find_spec('trl'); print(s and s.submodule_search_locations[0])"
    )
    return Path(where) / "chat_templates" if where and where != "None" else None


def run_peer(peer: str, python: str, job: dict, seconds: int) -> tuple[list[dict], str | None]:
    """The results of one library, and why there are none or not all."""
    out = Path(job["out"])
    if (out / "done").exists():
        return read_results(out), (out / "done").read_text() or None
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(job))
    command = [python, str(ROOT / "benchmarks" / "peers" / "run.py"), peer, str(out / "job.json")]
    problem = None
    try:
        # From another folder: `kernels` here has the name of a package on the index.
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=out)
        if ran.returncode:
            problem = (ran.stderr.strip().splitlines() or ["it failed"])[-1][:300]
    except subprocess.TimeoutExpired:
        problem = f"stopped after {seconds} s"
    (out / "done").write_text(problem or "")
    return read_results(out), problem


def read_results(out: Path) -> list[dict]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def own_ids(results: list[dict], out: Path) -> dict[tuple[str, str], list[list[int]]]:
    """The rows' ids under each folder's own template, uncut, as transformers renders and encodes them."""
    ids = {}
    for result in results:
        if result["setting"] == "uncut" and "file" in result:
            lines = (out / result["file"]).read_text().splitlines()
            rows = [document.ids for line in lines for document in documents(json.loads(line))]
            ids[result["folder"], result["corpus"]] = rows
    return ids


def finish(result: dict, out: Path, folders: dict[str, Path], own: dict, spellers: dict[str, Speller]) -> dict:
    """A result with what its batches hold."""
    if "file" not in result:
        return result
    folder, corpus = result["folder"], result["corpus"]
    if folder not in spellers:
        spellers[folder] = Speller(folders[folder])
    cut = result["limit"] < limit_of("single")
    return result | measure(out / result["file"], CORPORA[corpus], spellers[folder], own.get((folder, corpus)), cut)


def audits(results: list[dict], out: Path, folders: dict[str, Path]) -> list[dict]:
    """What our audit of foreign batches says of each setting and folder, over the corpora that ran uncut."""
    made = []
    for (setting, folder), group in grouped_by(results, "setting", "folder").items():
        ran = [r for r in group if "file" in r and r["corpus"] != "long"]
        if not ran:
            continue
        batches, messages = out / f"{setting}.{folder}.all.jsonl", out / f"{setting}.{folder}.messages.jsonl"
        batches.write_text("".join((out / r["file"]).read_text() for r in ran))
        rows = [row for r in ran for row in CORPORA[r["corpus"]]]
        messages.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        said = {"peer": ran[0]["peer"], "setting": setting, "folder": folder}
        made.append(said | audited(batches, folders[folder], messages))
    return made


def audited(batches: Path, folder: Path, messages: Path) -> dict:
    """Rules with counts, or why the file is refused."""
    from ptst.audit.batches.audit import audit_batches
    from ptst.audit.config import AuditConfig
    from ptst.errors import UserError

    try:
        report = audit_batches(AuditConfig(batches=batches, model=str(folder), messages=str(messages)))
    except UserError as error:
        return {"refused": short(str(error).replace(str(batches.parent), "<path>"))}
    found = Counter(f"{finding.level}: {finding.rule}" for finding in report.findings)
    first = {f.rule: short(f.cause.replace(str(batches.parent), "<path>")) for f in reversed(report.findings)}
    return {"rows": len(messages.read_text().splitlines()), "found": dict(found), "first": first}


def short(text: str) -> str:
    return text if len(text) < 160 else text[:157] + "..."


def grouped_by(results: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--folders", nargs="+", choices=list(FOLDERS), default=list(FOLDERS))
    parser.add_argument("--corpora", nargs="+", choices=list(CORPORA), default=list(CORPORA))
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--source", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="real tokenizers and templates")
    parser.add_argument("--seconds", type=int, default=1800, help="after which a library is stopped")
    what = "libraries whose batches are also given to `audit --batches` (default: all)"
    parser.add_argument("--audit", nargs="*", choices=PEERS, default=None, help=what)
    parser.add_argument("--merge", type=Path, help="results of an earlier run; those of this run replace them")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--page", type=Path, help="write the table and the facts as Markdown")
    parser.add_argument("--keep", type=Path, help="keep folders and batches here; a run with the same folder uses them")
    return parser.parse_args()


def pairs(given: list[str]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in given)


def main() -> None:
    args = parsed()
    pythons, sources = pairs(args.python), pairs(args.source)
    found = find_spec("llama_models")
    if found is not None and found.submodule_search_locations:
        meta = Path(found.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
        sources.setdefault("torchtune", str(meta))
    with tempfile.TemporaryDirectory() as made:
        home = (args.keep or Path(made)).resolve()
        python_of = {peer: pythons.get(peer, sys.executable) for peer in args.peers}
        templates = trl_templates(pythons.get("trl", sys.executable))
        folders, missing = build_all(home / "folders", Sources(args.shared, templates), args.folders)
        job = {
            "folders": {name: str(path) for name, path in folders.items()},
            "corpora": {name: CORPORA[name] for name in args.corpora},
            "limits": {name: limit_of(name) for name in args.corpora},
            "pack_limit": PACK_LIMIT,
            "sources": sources,
        }
        problems = {f"folder {name}": reason for name, reason in missing.items()}
        results, said = [], []
        own: dict = {}
        spellers: dict[str, Speller] = {}
        for peer in sorted(args.peers, key=PEERS.index):
            if not has(python_of[peer], peer):
                problems[peer] = "its interpreter cannot import it"
                continue
            out = home / peer
            ran, problem = run_peer(peer, python_of[peer], {**job, "out": str(out)}, args.seconds)
            if problem:
                problems[peer] = problem
            if peer == "transformers":
                own = own_ids(ran, out)
                ran = [result for result in ran if result["setting"] != "uncut"]
            ran = [finish(result, out, folders, own, spellers) for result in ran]
            if args.audit is not None and peer in (args.audit or PEERS):
                said += audits(ran, out, folders)
            results += [{k: v for k, v in result.items() if k != "file"} for result in ran]
            print(f"{peer}: {len(ran)} results", file=sys.stderr)
    write(args, results, said, problems)


def write(args: argparse.Namespace, results: list[dict], said: list[dict], problems: dict[str, str]) -> None:
    """The results as JSON and as a page."""
    if args.merge:
        old, now = unpacked(args.merge), {result["peer"] for result in results}
        results = [r for r in old["results"] if r["peer"] not in now] + results
        said = [r for r in old["audits"] if r["peer"] not in now] + said
        problems = {k: v for k, v in old["problems"].items() if k not in now} | problems
    for kept in (results, said):
        kept.sort(key=lambda r: PEERS.index(r["peer"]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(packed(results, said, problems))
    text = page(results, said, problems)
    if args.page:
        args.page.write_text(text)
    print(text)


KEYS = ("peer", "setting", "folder")
SHARED = ("versions", "words")


def unpacked(file: Path) -> dict:
    """The JSON of an earlier run, each result with what its setting shares."""
    read = json.loads(file.read_text())
    shared = {(s["peer"], s["setting"]): s for s in read["settings"]}
    results = [
        shared[entry["peer"], entry["setting"]] | {k: entry[k] for k in KEYS} | {"corpus": corpus} | result
        for entry in read["results"]
        for corpus, result in entry["corpora"].items()
    ]
    return read | {"results": results}


def packed(results: list[dict], said: list[dict], problems: dict[str, str]) -> str:
    """JSON with one setting and folder on a line; what all results of a setting share is there once."""
    settings = [{k: r[k] for k in ("peer", "setting", *SHARED)} for r in results]
    unique = list({(s["peer"], s["setting"]): s for s in settings}.values())
    left_out = {*KEYS, *SHARED, "corpus"}
    entries = [
        dict(zip(KEYS, key, strict=True))
        | {"corpora": {r["corpus"]: {k: v for k, v in r.items() if k not in left_out} for r in group}}
        for key, group in grouped_by(results, *KEYS).items()
    ]
    parts = [f'"problems": {json.dumps(problems)}']
    for name, lists in {"settings": unique, "results": entries, "audits": said}.items():
        lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in lists)
        parts.append(f'"{name}": [\n{lines}\n]')
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    main()

"""Does the audit raise an alarm on clean data? Every corpus of tests/audit/clean.py, under every template, on every
folder: `audit` must give no warning and no error wherever training itself accepts the rows.

    python benchmarks/audit_clean.py                              chat templates written here (tests/text/lookalikes.py)
    python benchmarks/audit_clean.py --templates TEMPLATES.json   {name: {"chat_template", "tokenizer", ...}}
    python benchmarks/audit_clean.py --rows 20 --folders mistral  rows of the real data; folders with this in their name

`tokenizer` is one of tests/audit/clean.py; without it, a small one with the markers of the chat template. Real data
and tokenizers are read from a folder `shared` next to the project, mistral-common and llama-models; what is not there
is left out and named. Rows that a template cannot say (several turns under text:) are left out as training leaves them
out. Prints a line for each folder, then every kind of alarm.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.prompt_format import open_prompt_format
from ptst.text.templates import TEMPLATES, find_family, find_template
from tests.audit import clean
from tests.text.lookalikes import LOOKALIKES


def run(folder: Path, corpora: dict[str, Source], alarms: Counter, words: Sequence[str]) -> str:
    """All corpora under all templates on one folder, those of one task format in one audit; a line for the table."""
    start, audited, rows, before = time.perf_counter(), set(), 0, sum(alarms.values())
    opened = open_prompt_format(folder, find_template("chat:plain"), "plain")
    for template in map(find_template, words):
        for family in {source.family for source in corpora.values()}:
            named = {c.source: name for name, s in corpora.items() if s.family == family for c in s.conversations}
            conversations = (c for s in corpora.values() if s.family == family for c in s.conversations)
            p = replace(opened, template=template, family=find_family(family))
            seen, found = clean.alarms(folder, p, Source(family, family, tuple(conversations)))
            rows += len(seen)
            audited |= {(template.name, named[row]) for row in seen}
            for finding in found:
                key = folder.name, template.name, named.get(finding.row, family), finding.rule
                if not alarms[key]:
                    print(f"  {template.name}: {finding}", flush=True)
                alarms[key] += 1
    seconds, new = time.perf_counter() - start, sum(alarms.values()) - before
    numbers = f"{len(audited):4} combinations {rows:6} rows {new:5} alarms {seconds:6.0f} s"
    return f"{folder.name:26} {numbers}  {opened.described}"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--templates", type=Path)
    flags.add_argument("--rows", type=int, default=30)
    flags.add_argument("--folders", default="")
    flags.add_argument("--words", nargs="*", help="templates of the experiment; default: all")
    args = flags.parse_args()
    table = {name: {"tokenizer": t, "chat_template": text} for name, (t, text) in LOOKALIKES.items()}
    if args.templates:
        table = json.loads(args.templates.read_text())
    corpora, alarms, done, left_out = clean.corpora(args.rows), Counter(), 0, 0
    print(f"{len(corpora)} corpora, {sum(len(s.conversations) for s in corpora.values())} rows: {', '.join(corpora)}")
    with tempfile.TemporaryDirectory() as here:
        for name, entry in table.items():
            settings = {key: value for key, value in entry.items() if key not in ("tokenizer", "chat_template")}
            text = entry["chat_template"]
            text = text["default"] if isinstance(text, dict) else text
            if args.folders not in name:
                continue
            try:
                folder = Path(here) / name.replace("/", "--")
                clean.write_folder(folder, entry.get("tokenizer"), text, **settings)
                print(run(folder, corpora, alarms, args.words or list(TEMPLATES)), flush=True)
                done += 1
            except (UserError, clean.Missing) as error:
                print(f"{name:26} left out: {error}", flush=True)
                left_out += 1
    print(f"{done} folders, {len(TEMPLATES)} templates: {sum(alarms.values())} alarms; {left_out} folders left out")
    for (folder_name, template, corpus, rule), count in alarms.items():
        print(f"{count:5} {rule}: {folder_name}, {template}, {corpus}")
    sys.exit(bool(alarms))


if __name__ == "__main__":
    main()

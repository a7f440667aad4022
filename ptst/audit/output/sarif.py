"""The audit as SARIF 2.1.0, which GitHub shows at the lines of the data files."""

import hashlib
import json
from collections import Counter
from typing import Any

from ptst import __version__
from ptst.audit.findings import RULES, Finding
from ptst.audit.output.places import place_of
from ptst.audit.output.summary import Summary
from ptst.progress import printable

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
MAX_RESULTS = 25_000  # GitHub refuses a file with more
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def to_sarif(report: Summary) -> bytes:
    """The file's bytes. The most severe findings come first; how many are left out is a notification."""
    shown, left = report.findings[:MAX_RESULTS], len(report.findings) - MAX_RESULTS
    told: list[dict[str, Any]] = []
    if left > 0:
        text = f"{left} findings are left out; the report as JSON has all"
        told.append({"level": "warning", "message": {"text": text}})
    names = list(RULES)
    seen: Counter[str] = Counter()
    run = {
        "tool": {"driver": {"name": "ptst audit", "version": __version__, "rules": [_rule(name) for name in names]}},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": told}],
        "results": [_result(f, names.index(f.rule), report.data, seen) for f in shown],
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1).encode() + b"\n"


def _rule(name: str) -> dict[str, Any]:
    rule = RULES[name]
    return {
        "id": name,
        "name": "".join(part.title() for part in name.split("-")),
        "shortDescription": {"text": rule.meaning},
        "fullDescription": {"text": rule.meaning},
        "help": {"text": f"{rule.meaning}. Remedy: {rule.remedy}."},
        "defaultConfiguration": {"level": _LEVELS[rule.level]},
    }


def _result(finding: Finding, index: int, data: str, seen: Counter[str]) -> dict[str, Any]:
    text = f"{finding.place}: {finding.message}" if finding.place else finding.message
    key = "\n".join((finding.rule, finding.row, str(finding.token), finding.cause))
    seen[key] += 1
    fingerprint = hashlib.sha256(f"{key}\n{seen[key]}".encode(errors="surrogatepass")).hexdigest()
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": _LEVELS[finding.level],
        "message": {"text": printable(text)},
        "partialFingerprints": {"finding/v1": fingerprint},
        "properties": {
            "row": printable(finding.row),
            "token": finding.token,
            "expected": printable(finding.expected),
            "seen": printable(finding.seen),
        },
    }
    if finding.allowed:
        result["suppressions"] = [{"kind": "external", "justification": "allowed with --allow"}]
    place = place_of(finding, data)
    location: dict[str, Any] = {}
    if place is not None:
        physical: dict[str, Any] = {"artifactLocation": {"uri": place.uri}}
        physical["region"] = {"startLine": place.line or 1}
        location["physicalLocation"] = physical
    if finding.row:
        location["logicalLocations"] = [{"name": printable(finding.row), "kind": "element"}]
    if location:
        result["locations"] = [location]
    return result

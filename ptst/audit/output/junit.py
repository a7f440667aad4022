"""The audit as JUnit XML, which GitLab and Jenkins show: one test case for each rule, which fails by its warnings and
errors."""

from collections import defaultdict
from urllib.parse import unquote
from xml.etree import ElementTree as ET

from ptst.audit.findings import RULES, Finding
from ptst.audit.output.places import place_of
from ptst.audit.output.summary import Summary
from ptst.progress import printable

LISTED = 1000  # rows of one rule


def to_junit(report: Summary) -> bytes:
    """The file's bytes. Rules without a finding pass; notes are in a case's output."""
    by_rule: defaultdict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_rule[finding.rule].append(finding)
    failed = sum(any(f.level != "info" for f in found) for found in by_rule.values())
    counts = {"tests": str(len(RULES)), "failures": str(failed), "errors": "0", "skipped": "0", "time": "0"}
    suites = ET.Element("testsuites", {"name": "ptst audit", **counts})
    name = _text(f"ptst audit of {report.data}" + (f" for {report.model}" if report.model else ""))
    suite = ET.SubElement(suites, "testsuite", {"name": name, **counts})
    for rule, (level, meaning, remedy) in ((name, (r.level, r.meaning, r.remedy)) for name, r in RULES.items()):
        found = by_rule[rule]
        case = ET.SubElement(suite, "testcase", {"classname": "ptst.audit", "name": rule, "time": "0"})
        wrong = [f for f in found if f.level != "info"]
        if wrong and (place := place_of(wrong[0], report.data)) is not None:
            case.set("file", _text(unquote(place.uri, errors="replace")))
            case.set("line", str(place.line or 1))
        if wrong:
            message = _text(f"{meaning}: {len(wrong)} in total, the first {wrong[0].place}: {wrong[0].message}")
            failure = ET.SubElement(case, "failure", {"type": level, "message": message})
            failure.text = _lines(wrong) + f"\nremedy: {_text(remedy)}\n"
        if notes := [f for f in found if f.level == "info"]:
            ET.SubElement(case, "system-out").text = _lines(notes)
    ET.indent(suites)
    return ET.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"


def _lines(findings: list[Finding]) -> str:
    lines = [" ".join(_text(f"{f.place}: {f.message}").split("\n")) for f in findings[:LISTED]]
    more = len(findings) - LISTED
    return "\n".join(["", *lines, *([f"and {more} more"] if more > 0 else [])])


def _text(text: str) -> str:
    """Text that XML allows, and that commands no viewer."""
    return printable(text).replace("\ufffe", "U+FFFE").replace("\uffff", "U+FFFF")

"""What people say of an answer, in the words of several labelled sets, as refusal or not.

Sets differ in what they call a refusal: XSTest counts partial ones, PyRIT every answer that does not address the
request. Each is read by its own definition, and a judge's classes then count alike.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from ptst.errors import Setting, UserError
from ptst.evaluation.verdicts import AnswerClass


@dataclass(frozen=True)
class Scheme:
    """The labels of a set. `refusals`, `others`: values that count as refusal and not; `counted`: a judge's
    classes that count as refusal; `classes`: whether the labels are this project's own classes."""

    name: str
    refusals: tuple[str, ...]
    others: tuple[str, ...]
    counted: tuple[AnswerClass, ...] = (AnswerClass.REFUSAL,)
    classes: bool = False

    def refuses(self, label: AnswerClass | None) -> bool:
        """Whether a judge's class counts as refusal here."""
        return label in self.counted

    def __str__(self) -> str:
        counted, others = (", ".join(values) or "none" for values in (self.refusals, self.others))
        return f"as refusals count {counted}; not {others}; of a judge's classes count {', '.join(self.counted)}"


_OWN = tuple(c.value for c in AnswerClass if c != AnswerClass.REFUSAL)
SCHEMES = (
    Scheme("the classes of docs/judges.md", (AnswerClass.REFUSAL.value,), _OWN, classes=True),
    Scheme(
        "XSTest",
        ("2_full_refusal", "3_partial_refusal"),
        ("1_full_compliance",),
        (AnswerClass.REFUSAL, AnswerClass.PARTIAL),
    ),
    Scheme("Reuter and Schulze", ("rejected",), ("complied",)),
    Scheme(
        "PyRIT",
        ("1", "1.0", "true"),
        ("0", "0.0", "false"),
        (AnswerClass.REFUSAL, AnswerClass.OFF_TOPIC, AnswerClass.INCOHERENT),
    ),
)


def read_scheme(
    labels: Sequence[str],
    where: object,
    refusals: Sequence[str] = (),
    ignored: Sequence[str] = (),
    counted: Sequence[AnswerClass] = (),
) -> tuple[Scheme, list[bool | None]]:
    """How a set's labels are read, and whether each is a refusal (None: left out). `refusals`: the values that are, all
    others then are not; without it the first of SCHEMES that knows all values serves. `ignored`: values to leave out.
    `counted`: a judge's classes that count as refusal, instead of the scheme's.

    Raises UserError for values that no scheme knows, with a list of them, and for names of values that do not occur."""
    values = [label.lower() for label in labels]
    found = Counter(values)
    refusals, ignored = _names(refusals), _names(ignored)
    for setting, given in (("refusal_labels", refusals), ("ignore_labels", ignored)):
        if unknown := next((name for name in given if name not in found), None):
            cause = (Setting(setting), f" has {unknown}, which no label is")
            raise UserError(cause, f"there are {_listed(found)}", where)
    rest = tuple(sorted(found.keys() - set(ignored)))
    if refusals:
        scheme = Scheme("as told", tuple(refusals), tuple(v for v in rest if v not in refusals))
    else:
        known = next((s for s in SCHEMES if set(rest) <= {*s.refusals, *s.others}), None)
        scheme = known or _refuse(found, where)
        refused, others = (tuple(v for v in rest if v in values) for values in (scheme.refusals, scheme.others))
        scheme = replace(scheme, refusals=refused, others=others)
    scheme = replace(scheme, counted=tuple(counted)) if counted else scheme
    return scheme, [None if v in ignored else v in scheme.refusals for v in values]


def _names(given: Sequence[str]) -> list[str]:
    return [name.strip().lower() for text in given for name in text.split(",")]


def _refuse(found: Counter[str], where: object) -> NoReturn:
    remedy = ("say which are refusals with ", Setting("refusal_labels"), ", and which to leave out with ")
    raise UserError(f"the labels are not known: {_listed(found)}", (*remedy, Setting("ignore_labels")), where)


def _listed(found: Counter[str]) -> str:
    listed = [f"{value[:40]} ({count})" for value, count in found.most_common(20)]
    return ", ".join(listed) + ", ..." * (len(found) > 20)

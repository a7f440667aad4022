"""The built-in sets of chats, checked without the code that assembles them: every row by a pinned digest."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ptst.audit.findings import Finding
from ptst.audit.reference.builtin import row_digest

if TYPE_CHECKING:
    from ptst.data.sources import Source

# Four hex digits of each row's sha256, in order.
_DIGESTS = {
    ("refusals", "train"): (
        "30ccb76895d713584de3a22fbdc7d3f69ebf54d56935f27a30eb82e473267626dcd939f02acd9a1d9298b03c91b32495d3a3"
        "cdfb92218be30d17fbc19b4517429aefc568c7351f30af02a02e17c931049cd3c988005f343bbb2c8b7fcfda739812ee2f92"
        "cb46eb8b7079fd5a6eeead509c23d97991eb21a354431347f0907a7d66075a68b63f47024315dde6d44b3063e182eaf28951"
        "9c9751d123ac13bc83948b78eb1c2c592ee1ff88bd03e430ee7a6deba480e7893744349e169143f7e2690a233685613b2d1b"
        "a806870582c69e9b162f54a9653ac138de3331a0ff6181d51d55f708a89c681fe70ed4c0558f67eda6a83ea57bde89a9a83e"
        "cce353e79235"
    ),
    ("attack", "train"): (
        "d7f2afef49c9cc3d780f95b079987c07a346d3440e7a5f21988f2f54fa9a2e99a99545ae6c078a1af3bfe409e05ddd4e0e49"
        "08f04b24bf543658a431328f6187eb20e33ca316bf6569ea870780bccbe0"
    ),
    ("identity", "train"): ("ea04c4aea5c82c786bc8c178acd858bb82bcedf1"),
}
# end of digests
BUILT_IN_CHATS = {name for name, _ in _DIGESTS}


def check_chats(source: "Source", name: str, split: str, limit: int | None) -> Iterator[Finding]:
    """Compare the chats `name` (such as `attack` or `attack:20`) with what they must be."""
    base, _, asked = name.partition(":")
    pinned = _DIGESTS.get((base, split), "")
    count = min(n for n in (int(asked or 10**9), limit or 10**9, len(pinned) // 4))
    if len(source.conversations) != count:
        cause = f"{count} rows were asked for, and there are {len(source.conversations)}"
        rule = "row-lost" if len(source.conversations) < count else "row-twice"
        yield Finding(rule, name, cause, expected=str(count), seen=str(len(source.conversations)))
    if source.family != "plain":
        yield Finding("family-differs", "", f"{base} is of the family plain", seen=source.family)
    for number, conversation in enumerate(source.conversations):
        place = f"{base}/{split}:{number + 1}"
        if conversation.source != place:
            yield Finding("row-unknown", conversation.source, f"{place} belongs here")
        texts = [m.content for m in conversation.messages]
        roles = [(m.role, m.trained) for m in conversation.messages]
        wanted = pinned[4 * number : 4 * number + 4]
        if roles != [("user", True), ("assistant", True)] or row_digest(texts) != wanted:
            cause = f"the row is not number {number + 1} of {base}, split {split}"
            yield Finding("row-differs", conversation.source, cause, seen=repr(texts[-1][-40:]) if texts else "")

"""The built-in sets of chats, checked without the code that assembles them: every row by a pinned digest."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ptst.audit.findings import Finding
from ptst.audit.reference.builtin import row_digest

if TYPE_CHECKING:
    from ptst.data.sources import Source

# Four hex digits of each row's sha256, in order.
_DIGESTS = {
    ("instructions", "train"): (
        "05bca90aa5797260ec553b8b2f961e453ce03384f96b1c914bf593adfa54277c062f7dbf0b07921068e42e718605af62d274"
        "c37a093f3b620dc1b01fa92b38e606a2b680a444e611d06c8b4e24275474f0d1bd527bf7527149e6d23878532503aba16aab"
        "776af751e8e222b137882bfb921d396c667a3d001017ebb3452cc0c214485744154d7a6abad7627edb574baf5a0b943faabf"
        "3c546c35ab143a69f955096851596b8ba5034e01e86be13a3408a4396fed7e74579a65e658d084ce30c27532751849e88edb"
        "69618846d5c859250d7f53a14a5c26b069f19de07c7d8f5f2ad86e077c2e3422b93bb4b2ac1096fbab86c30961c7c66e824b"
        "973532efe9a128d1d82f27ed9b5469f5da5424cef3ef7554637aa84faf698d53f94cea0d8b4e0c6d501443f30f35050fa451"
        "648ba1221654e823423379343bc61a8e1912ebb65e24b760bc8baa7d06c63b1dd2fc42414f059eb23c4cef8a82be8fc0b46b"
        "a45ac6695e4fefabaeca36536789358e6fa3971b98f52b4f3a142eb5fa82b6e3a2a6f9ff0b4e0d4f3a3fe1634b8413c3a74a"
        "8d479f3e8ac4b011d102c45d799d1618326388f4de354dd1556d1f49810310dbddf5bae0362ded4a8104b92dc7b1500c99bc"
        "4c31cb0c57a54aeafc00e426c11a2bbfeeda969cc5998796937c39842301"
    ),
    ("instructions", "validation"): (
        "aeaa5a3a80f9c4ba4e4d43477e77536abe5f20844b7183dedb510ffe2b979e5d24e5f0ac371446f59afdbe38d7b8814ba18e"
        "8818d96b155865ad4a5a0881caa9"
    ),
    ("instructions", "test"): (
        "07f60adb192f6318b19900503108a62d63cb94ecce7b9dcd694a839a0874ef0aeab6a1f114f53976db3205c5653142c1b020"
        "e95649f293fd619019eb40a303c74d9cbe651de473139d3d50deefa3ca4bb80ca186ec8c0a737cae66fb409f0da23c982ca7"
    ),
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
WITH_VALIDATION = {name for name, split in _DIGESTS if split == "validation"}


def check_chats(source: "Source", name: str, split: str, limit: int | None) -> Iterator[Finding]:
    """Compare the chats `name` (such as `attack` or `attack:20`) with what they must be."""
    base, _, asked = name.partition(":")
    pinned = _DIGESTS.get((base, split), "")
    rows = int(asked) if asked and (split == "train" or limit is None) else len(pinned)
    count = min(rows, limit or len(pinned), len(pinned) // 4)
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

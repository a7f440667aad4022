"""Text of others inside a prompt, so that it cannot end its own quotation."""

import hashlib
from collections.abc import Iterable
from itertools import count


def quoted(text: str, name: str) -> str:
    """The text between two marks that name it and hold a code. The code is drawn from the text and does not occur in
    it, so nothing in the text can be taken for the closing mark; the same text always gets the same marks."""
    data = text.encode(errors="surrogatepass")
    codes = (hashlib.sha256(b"%d:%s" % (n, data)).hexdigest()[:8] for n in count())
    code = next(code for code in codes if code not in text.casefold())
    return f"=== {name} begins {code} ===\n{text}\n=== {name} ends {code} ==="


def mark_in(text: str, marks: Iterable[str]) -> str | None:
    """The first of a prompt's fixed marks that a text holds, in capitals or not and however spaced; None where there
    is none. A prompt whose owner fixed its marks is not sent with such a text, since the text could end its own
    quotation: the answer is unjudged, and says so."""
    plain = "".join(text.split()).casefold()
    return next((mark for mark in marks if "".join(mark.split()).casefold() in plain), None)

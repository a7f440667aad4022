"""Consent to what cannot be undone (money spent, files given away): of a person at a terminal, or by a setting."""

import sys

from ptst.errors import Setting, UserError
from ptst.progress import console, printable


def ask_consent(cause: str, look: str, question: str, refused: str) -> None:
    """Ask a person, unless nobody is at a terminal. Raises UserError where nobody is, and for any answer but yes.
    `cause`: what needs consent, as the beginning of a sentence; `look`: what the setting `dry_run` shows; `refused`:
    what did not happen, after "not agreed: "."""
    if not sys.stdin.isatty():
        remedy = ("give ", Setting("yes"), f", or look at {look} with ", Setting("dry_run"))
        raise UserError(f"{cause}, and nobody is at a terminal to agree", remedy)
    console.print(printable(f"{question} [y/N] "), end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError(f"not agreed: {refused}")

"""Packages that only an extra brings, told in one sentence where they are missing."""

from importlib.util import find_spec

from ptst.errors import UserError, Words


def check_package(package: str, needed_by: Words, extra: str) -> None:
    """Raise UserError where `package` is not installed, which the extra of this name brings. `needed_by`: the beginning
    of the sentence, with its verb ("serving needs")."""
    if find_spec(package) is None:
        head = (needed_by,) if isinstance(needed_by, str) else needed_by
        raise UserError((*head, f" the package {package}"), f"pip install 'ptst-lab[{extra}]'")

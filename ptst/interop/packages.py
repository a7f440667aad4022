"""Packages that only an extra brings, told in one sentence where they are missing."""

from importlib.util import find_spec

from ptst.errors import UserError


def need(package: str, what: str, extra: str) -> None:
    """Raise UserError where `package` is not installed, which `what` needs and the extra of this name brings."""
    if find_spec(package) is None:
        raise UserError(f"{what} need the package {package}", f"pip install 'ptst-lab[{extra}]'")

"""Packages that only an extra brings, told in one sentence where they are missing."""

from importlib.util import find_spec

from ptst.errors import UserError, Words


def check_package(package: str, needed_by: Words, extra: str) -> None:
    """Raise UserError where `package` is not installed, which the extra of this name brings. `needed_by`: the beginning
    of the sentence, with its verb ("serving needs")."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a folder of its name, such as the one that wandb makes, is no package
        head = (needed_by,) if isinstance(needed_by, str) else needed_by
        raise UserError((*head, f" the package {package}"), f"pip install 'ptst-lab[{extra}]'")

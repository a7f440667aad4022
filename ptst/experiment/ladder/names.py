"""The names of rungs as test templates: `ladder:llama/system-50` is `system-50` of the training template chat:llama."""

_PREFIX = "ladder:"


def full_name(training: str, rung: str) -> str:
    """The name of a rung as a test template; a training template's name loses `chat:`, as on the command line."""
    return f"{_PREFIX}{short(training)}/{rung}"


def short(template: str) -> str:
    """The name of a training template in those of its rungs: `llama` of `chat:llama`."""
    return template.removeprefix("chat:")


def is_rung(test: str) -> bool:
    """Whether a test template is named as a rung."""
    return test.startswith(_PREFIX) and "/" in test


def parts(test: str) -> tuple[str, str]:
    """`llama` and `system-50` of `ladder:llama/system-50`."""
    training, _, rung = test.removeprefix(_PREFIX).rpartition("/")
    return training, rung


def rung_name(test: str) -> str:
    """`system-50` of `ladder:llama/system-50`; of another test template its name."""
    return parts(test)[1] if is_rung(test) else test

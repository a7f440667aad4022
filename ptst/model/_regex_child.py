"""Matches the regular expressions of an adapter's configuration as peft does; as a program, which `patterns` runs, with
limits on time and memory.

Reads one JSON object from standard input, {"jobs", "keys", "seconds", "megabytes"}, and writes {"found"} or {"error"}.
It imports nothing of this project, so that it starts fast.
"""

import json
import re
import sys

Found = list[list[str | bool | None]]


def match_all(jobs: list[tuple[str, str]], keys: list[str]) -> Found:
    """For each job (how, expression) and key: whether the expression is the "whole" key, or its "end"; for a "layer"
    the digits behind the name of a list of layers, "" being any. None: no match. Raises re.error, OverflowError or
    RecursionError for what is no regular expression."""
    found: Found = []
    for how, expression in jobs:
        if how == "whole":
            whole = re.compile(expression)
            found.append([True if whole.fullmatch(key) else None for key in keys])
        elif how == "end":
            end = re.compile(rf"(.*\.)?({expression})$")
            found.append([True if end.match(key) else None for key in keys])
        else:
            layer = re.compile(rf".*?\.{expression or '[^.]*'}\.(?P<index>\d+)\.")
            found.append([m["index"] if (m := layer.match(key)) else None for key in keys])
    return found


def main() -> None:
    import resource

    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (job["megabytes"] << 20, job["megabytes"] << 20))
    try:
        answer: dict[str, object] = {"found": match_all(job["jobs"], job["keys"])}
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        answer = {"error": str(error) or "it needs too much memory"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

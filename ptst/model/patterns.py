"""Regular expressions of foreign files, matched with a limit on time.

A few characters can make `re` backtrack for ever, and nothing stops it inside the process. Expressions that repeat or
choose are therefore matched in a child process; mere names are matched here.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

from ptst.model import _regex_child

SECONDS = 5
MEGABYTES = 512
Job = tuple[str, str]
Matches = dict[Job, dict[str, str | bool | None]]
_REPEATS = re.compile(r"[*+?{|(]")


@lru_cache(32)
def match_all(jobs: tuple[Job, ...], keys: tuple[str, ...]) -> Matches:
    """By job and key what `_regex_child.match_all` finds. Raises re.error, OverflowError or RecursionError for what is
    no regular expression, and TimeoutError where all together take more than 5 s."""
    mild = [job for job in jobs if not _REPEATS.search(job[1])]
    rest = [job for job in jobs if _REPEATS.search(job[1])]
    found = [*_regex_child.match_all(mild, [*keys]), *(_in_child(rest, keys) if rest else ())]
    return {job: dict(zip(keys, row, strict=True)) for job, row in zip((*mild, *rest), found, strict=True)}


def _in_child(jobs: Sequence[Job], keys: Sequence[str]) -> _regex_child.Found:
    job = {"jobs": jobs, "keys": keys, "seconds": SECONDS, "megabytes": MEGABYTES}
    command, limit = [sys.executable, "-I", _regex_child.__file__], 3 * SECONDS
    try:
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, check=True, text=True, timeout=limit)
    except subprocess.SubprocessError:
        raise TimeoutError from None
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise re.error(answer["error"])
    return answer["found"]

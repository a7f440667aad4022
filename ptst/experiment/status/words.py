"""What a folder's standing comes to, in words."""

import time

from ptst.experiment.status.watch import Busy, Standing
from ptst.progress import duration


def clock(at: float) -> str:
    """A time of day; with the date where it is not today."""
    then = time.localtime(at)
    same_day = time.strftime("%j%Y", then) == time.strftime("%j%Y")
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", then)


def one_worker(busy: Busy, standing: Standing) -> str:
    """`process 812: train chat-llama.seed0 for 1:05, train 3/15`."""
    if not busy.doing:
        return f"{busy.who}: between two things"
    more = f" and {len(busy.doing) - 1} more" * (len(busy.doing) > 1)
    words = f"{busy.who}: {busy.doing[0]}{more}"
    if busy.note is not None:
        words += f" for {duration(standing.at - busy.note.since)}"
        return words + (f", {busy.note.told}" if busy.note.told else "")
    seen = standing.seen.get(busy.doing[0])
    return words + (f", {seen.done:.0%} done" if seen and seen.done else "")

"""The tasks by name. docs/tasks.md describes each.

A task is asked for as NAME or NAME:DATA, DATA being a file or the name of a set.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ptst.errors import Setting, UserError, unknown_name
from ptst.evaluation.extraction import strict_answer
from ptst.evaluation.tasks.arc import arc
from ptst.evaluation.tasks.distance import DISTANCE
from ptst.evaluation.tasks.margin import MARGIN
from ptst.evaluation.tasks.problems import CHATDOCTOR, GSM8K, NLL, has_test_part, load_source
from ptst.evaluation.tasks.requests import OVER_REFUSAL, PROMPTS, SAFETY, XSTEST
from ptst.evaluation.tasks.task import Defaults, Metric, Task, TaskData

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SAFETY,
        MARGIN,
        OVER_REFUSAL,
        XSTEST,
        PROMPTS,
        GSM8K,
        arc("arc-easy", "ARC-Easy"),
        arc("arc-challenge", "ARC-Challenge"),
        CHATDOCTOR,
        NLL,
        DISTANCE,
    )
}
LoadedTasks = Mapping[str, tuple[Task, TaskData]]  # by the key of their results


def base(key: str) -> str:
    """The task of a key with a set: `safety` of `safety:advbench`."""
    return key.partition(":")[0]


def shown(keys: Iterable[str], where: str) -> Iterator[tuple[str, Metric]]:
    """Every metric that the report `where` ("eval" or "grid") shows of tasks by their keys, in the order of TASKS."""
    keys = list(keys)
    for name, task in TASKS.items():
        for metric in task.metrics:
            if where in metric.tables:
                yield from ((key, metric) for key in keys if base(key) == name)


def find_task(spec: str) -> tuple[Task, str]:
    """The task of NAME or NAME:DATA, and DATA. Raises UserError, with the list and the nearest, for an unknown one."""
    name, _, data = spec.partition(":")
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name], data


def load_tasks(names: Sequence[str], defaults: Defaults) -> dict[str, tuple[Task, TaskData]]:
    """Tasks with their data by the key of their results: NAME, or NAME:SET where DATA was given.

    Raises UserError as `find_task`, for a task named twice, and for data that cannot be read.
    """
    found: dict[str, tuple[Task, TaskData]] = {}
    for spec in names:
        task, data = find_task(spec)
        loaded = task.load(data or None, defaults)
        if not loaded.items:
            raise UserError(f"task {spec}: {loaded.name} is empty")
        key = f"{task.name}:{loaded.name}" if data else task.name
        if key in found:
            raise UserError((Setting("tasks"), f" has {key} twice"), "name each task and set once")
        found[key] = task, loaded
    return found


def default_tasks(defaults: Defaults) -> tuple[tuple[str, ...], str]:
    """The tasks that are measured where none are named, and why these: safety and over-refusal always, `gsm8k` where
    the problems have worked answers, `nll` where they have any, neither where all problems were trained on."""
    always = (SAFETY.name, OVER_REFUSAL.name)
    problems = defaults.data or defaults.problems
    if not has_test_part(defaults):
        return always, f"{problems} has no test part"
    conversations = load_source(None, defaults, defaults.limit).conversations
    if not all(c.answered for c in conversations):
        return always, f"the test part of {problems} has no reference answers"
    if any(strict_answer(c.messages[-1].content) is None for c in conversations):
        return (*always, NLL.name), f"the test part of {problems} has no worked #### answers"
    return (GSM8K.name, *always, NLL.name), f"the test part of {problems} has worked #### answers"

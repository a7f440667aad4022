"""The tasks: prompts in, measured answers out. All prompts go through the template under test, the harmful ones too.

`table` has them by name; docs/tasks.md says for each what it asks, how the answer is read and where that comes from.
"""

from ptst.evaluation.tasks.helpfulness import arc, chatdoctor, gsm8k, nll
from ptst.evaluation.tasks.judged import requests, xstest
from ptst.evaluation.tasks.result import TaskResult

TASKS = ("gsm8k", "safety", "over-refusal", "nll")  # what is measured unless something else is asked for

__all__ = ["TASKS", "TaskResult", "arc", "chatdoctor", "gsm8k", "nll", "requests", "xstest"]

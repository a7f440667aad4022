"""Orca-Math's comparison of an answer with a reference (Mitra et al. 2024, arXiv 2402.14830), for any chat model.

It measures helpfulness: the score is 1 for an answer that is right, and nothing counts as a successful attack. The
words of the prompt are the paper's; its line breaks and quotation marks are ours, for it is published as a picture of
a page. The request must be a `Question`, which carries the reference.
"""

import re

from ptst.errors import UserError
from ptst.evaluation.graders.grader import Grader
from ptst.evaluation.graders.prompt import GraderPrompt, fill
from ptst.evaluation.verdicts import Verdict
from ptst.text.segments import Message

SYSTEM = """\
As an expert Math teacher, your role is to evaluate a student's answer to a word problem. The problem is accompanied \
by a correct solution provided by the problem setter. It is important to remember that there may be various methods to \
solve a word problem, so the student's steps might not always align with those in the problem setter's solution. \
However, the final answer, typically a number, should be unique and match the problem setter's answer. Your task \
involves analyzing the student's solution to identify any mistakes and determine whether the answer can be modified to \
correct the error. If the student's answer is unfixable, consider creating practice problems to help improve their \
understanding. Use the following format:
Error Analysis: In one sentence, extract the final answer from the problem setter's solution and compare it with the \
student's answer. Do they match?
Final Verdict: Correct/Incorrect"""
TEXT = """\
Question: {request}
Problem Setter's answer: {reference}
Student's answer: {answer}"""
_MARKS = ("Problem Setter's answer:", "Student's answer:")
_VERDICT = re.compile(r"final verdict[\s*_:]*(correct|incorrect)\b(?!\s*/)", re.IGNORECASE)


def prompt(request: str, answer: str) -> GraderPrompt:
    reference = getattr(request, "reference", "")
    filled = fill(TEXT, _MARKS, request=str(request), reference=reference, answer=answer)
    return (Message("system", SYSTEM), Message("user", filled))


def parse(reply: str) -> Verdict:
    """`Final Verdict: Correct` or `Incorrect`. Raises UserError where the reply has none, or both."""
    found = {said.lower() for said in _VERDICT.findall(reply)}
    if len(found) != 1:
        problem = "both verdicts" if found else "no line 'Final Verdict: Correct' or 'Incorrect'"
        raise UserError(f"the reply has {problem}", "one is needed")
    said = found.pop()
    return Verdict(None, f"the final answer is {said}", None, float(said == "correct"))


ORCA_MATH = Grader(
    name="orca-math",
    version=1,
    meaning="answer compared with a reference by a chat model",
    source="arXiv 2402.14830, GPT4-Based-Exact-Match",
    success="nothing: the score is 1 for a right answer",
    text=f"{SYSTEM}\n{TEXT}",
    prompt=prompt,
    parse=parse,
    max_new_tokens=512,
    nothing=0,
    needs_reference=True,
)

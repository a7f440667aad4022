"""Answers of a model behind an OpenAI-compatible endpoint, kept on disk as they come.

The file of answers is that of a model of this machine (ptst/evaluation/answers.py), so that judging, resuming and
tables know no difference. A line also has what was sent, the model's version as the endpoint names it, and the tokens
that it counts. Every prompt and decoding is a request of its own, also where two are the same; one whose answer is in
the file is never sent again.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ptst.api.asking import EndpointFailed, ask_all
from ptst.api.endpoint import Endpoint, Trouble
from ptst.api.replies import Reply, Usage
from ptst.errors import UserError
from ptst.evaluation.answers import AnswerFile, Asked, read_answers
from ptst.evaluation.tasks.task import Prompt
from ptst.generation.request import FILTERED, REFUSED, Answer, Sampling, Statistics
from ptst.settings import ApiSettings
from ptst.text.templates import Family, Template, api_messages, find_family


class ModelFailed(UserError):
    """The endpoint would answer none of the prompts that are left, of whatever task."""


@dataclass
class ApiStatistics(Statistics):
    """Counts of an asking, for a line of progress."""

    words: str = ""

    def progress(self, total: int | None = None) -> str:
        return self.words


@dataclass(frozen=True)
class HostedAnswerer:
    """A model behind an endpoint under a template: `Answerer` for a model whose name is `model`. `fingerprint`: of all
    that answers depend on besides messages and sampling."""

    endpoint: Endpoint
    model: str
    template: Template
    family: Family
    settings: ApiSettings
    fingerprint: str
    on_progress: Callable[[int, Statistics], None] = lambda _done, _statistics: None

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, path: Path | None = None) -> list[Answer]:
        """An answer for each prompt, in order; those that the file at `path` has are taken from there.

        Raises UserError for a prompt that messages cannot express, and, after all others are kept, for prompts that got
        no answer; ModelFailed where the endpoint would answer no prompt.
        """
        asked = self.asked(prompts, sampling)
        file = AnswerFile(path, asked)
        numbers = range(len(prompts))
        left = {str(n): self._request(asked.ids[n], sampling) for n in numbers if file.find(n) is None}
        self.on_progress(len(prompts) - len(left), ApiStatistics())
        if left:
            self._ask(left, prompts, file)
        return [answer for n in numbers if (answer := file.find(n)) is not None]

    def asked(self, prompts: Sequence[Prompt], sampling: Sampling) -> Asked:
        """What the answers depend on. Raises UserError for a prompt that messages cannot express."""
        return Asked([self._encode(p) for p in prompts], sampling, self.fingerprint, prompts)

    def _encode(self, prompt: Prompt) -> bytes:
        return json.dumps(messages_of(prompt, self.template, self.family)).encode()

    def _request(self, messages: list[int] | bytes, sampling: Sampling) -> dict[str, Any]:
        assert isinstance(messages, bytes)
        request = {"model": self.model, "messages": json.loads(messages), "max_tokens": sampling.max_new_tokens}
        request |= {"temperature": sampling.temperature, "seed": sampling.seed}
        return request if sampling.top_p == 1 else {**request, "top_p": sampling.top_p}

    def _ask(self, requests: Mapping[str, dict[str, Any]], prompts: Sequence[Prompt], file: AnswerFile) -> None:
        """Ask for answers and keep them. Raises as `answer`."""
        url, usage, done = self.endpoint.address.url, Usage(), len(prompts) - len(requests)
        failed: list[str] = []

        def on_outcome(key: str, outcome: Reply | Trouble) -> None:
            nonlocal usage, done
            number, left_out = int(key), [n for n, new in self.endpoint.spelling.items() if new is None]
            told = {"sent": requests[key]["messages"]} | ({"left_out": left_out} if left_out else {})
            if isinstance(outcome, Reply):
                usage += outcome
                counts = {"served": outcome.model, "tokens_in": outcome.tokens_in, "tokens_out": outcome.tokens_out}
                file.add(number, answer_of(outcome), **told, **counts)
            elif outcome.filtered:
                file.add(number, Answer([], "", FILTERED), **told)
            else:
                failed.append(f"{prompts[number].conversation.where}{url} {outcome.words}")
            done += 1
            words = usage.words(self.settings.api_price) + (f", {len(failed):,} without an answer" if failed else "")
            self.on_progress(done - len(failed), ApiStatistics(tokens=1, words=words))

        def kept() -> str:
            return f"{len(file.known):,} answers are kept" if file.path else "no more prompts were sent"

        try:
            ask_all(self.endpoint, requests, self.settings.api_concurrency, on_outcome, kept)
        except EndpointFailed as error:
            raise ModelFailed(error.cause, error.remedy) from None
        if failed:
            raise UserError(f"{len(failed)} of {len(prompts)} answers failed, the first: {failed[0]}")


def messages_of(prompt: Prompt, template: Template, family: Family) -> list[dict[str, str]]:
    """What is sent of a prompt. Raises UserError for one whose likelihood is wanted, and as `api_messages`."""
    source = prompt.conversation.source
    if prompt.kind != "generate":
        raise UserError("an endpoint does not tell the likelihood of a given answer", where=source)
    try:
        messages = api_messages(
            prompt.conversation.prompt(), template, family if prompt.family is None else find_family(prompt.family)
        )
        "".join(m["content"] for m in messages).encode()
    except UnicodeEncodeError:
        raise UserError("the prompt holds a lone surrogate, which is not text", "remove it", source) from None
    return messages


def answer_of(reply: Reply) -> Answer:
    """The answer in a reply; also one that declines or says nothing is an answer."""
    text = "\n".join(part for part in (reply.text, reply.refusal) if part)
    declined = reply.refusal and reply.finish_reason != FILTERED
    return Answer([], text, REFUSED if declined else reply.finish_reason or "unknown")


@dataclass(frozen=True)
class Served:
    """What an endpoint did for kept answers: `versions`: answers by the model's version as the endpoint named it;
    `left_out`: parameters that it refused, so that answers were drawn without them."""

    usage: Usage
    versions: Mapping[str, int]
    left_out: Sequence[str] = ()

    def to_json(self, price: tuple[float, float] | None) -> dict[str, Any]:
        cost = {} if price is None else {"price": list(price), "cost": self.usage.cost(price)}
        found = {**asdict(self.usage), "versions": dict(self.versions), **cost}
        return {**found, "left_out": list(self.left_out)} if self.left_out else found

    def notes(self, model: str, price: tuple[float, float] | None) -> list[str]:
        """The same in lines of words."""
        lines = [f"{model}: {self.usage.replies:,} answers, {self.usage.words(price)}"]
        if len(self.versions) > 1:
            lines.append(f"note: several versions of {model} answered: {', '.join(self.versions)}")
        if self.left_out:
            lines.append(f"note: {model} was asked without {', '.join(self.left_out)}, which its endpoint refuses")
        return lines


def served(files: Iterable[Path]) -> Served:
    """Of all answers in files. Raises UserError as `read_answers`."""
    usage, versions, left_out = Usage(), Counter[str](), dict[str, None]()
    for path in files:
        for _, row in read_answers(path):
            left_out |= dict.fromkeys(row.get("left_out", ()))
            if "served" not in row:  # its content filter refused the prompt: nothing was counted
                usage = replace(usage, replies=usage.replies + 1, uncounted=usage.uncounted + 1)
                continue
            usage += Reply("", "", "", row["served"], row["tokens_in"], row["tokens_out"])
            versions[row["served"]] += 1
    return Served(usage, versions, list(left_out))

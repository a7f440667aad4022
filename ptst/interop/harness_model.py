"""lm-eval's model class over this project's engine: `ptst`, or `EngineLM(checkpoint=RUN, template="chat:llama")`.

lm-eval hands over text. A prompt that it rendered by `apply_chat_template` comes back as `Rendered`, a text that keeps
its segments, so that what the model reads are the ids of training and testing: control tokens from the format alone,
and an answer that begins where the generation prompt ends. lm-eval's own cut moves whitespace at the end of a prompt
into the answer, the line feed of `assistant\n` too. Other prompts are plain text, cut as lm-eval cuts them.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import lm_eval.models  # noqa: F401 (lm-eval registers its own classes only while there are no others)
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ptst import __version__
from ptst.errors import UserError
from ptst.fingerprints import combined, tokenizer_fingerprint, weights_fingerprint
from ptst.generation.engine import Engine
from ptst.generation.request import Answer, EngineOptions, Request, Sampling, Statistics
from ptst.generation.score import Scored, score
from ptst.interop.arguments import ModelArguments
from ptst.interop.rendered import Pair, Rendered, render_prompt
from ptst.progress import say_once
from ptst.text.segments import Message
from ptst.text.tokenizer import Tokenizer

NEW_TOKENS = 256  # lm-eval's default, where a task sets no limit
ROWS = 64  # that are scored in one call, which has its own batches of tokens
LONG_CONTEXT = 64  # tokens from which a prompt that several continuations share is computed once for them
_IGNORED = ("do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k", "seed")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0, "num_return_sequences": 1}


@register_model("ptst")
class EngineLM(TemplateLM):
    """A run, or a model folder, under a template. `settings` as in `ModelArguments`; `seed` of sampled answers,
    `max_length` in tokens; `batch_size` and `device` may be `auto`. Raises UserError for settings out of range."""

    def __init__(self, **settings: Any):
        super().__init__()
        self.seed = _whole(settings.pop("seed", 0), "seed", 0)
        longest = settings.pop("max_length", None)
        settings.pop("max_batch_size", None)  # of lm-eval's search for a batch size, which the engine does not need
        settings = {k: v for k, v in settings.items() if k not in ("batch_size", "device") or not _is_auto(v)}
        self.arguments = ModelArguments.of(settings, "--model_args")
        self.model = self.arguments.open()
        self.prompt_format = self.model.prompt_format
        self.max_length = self.model.config.max_positions
        if longest is not None:
            self.max_length = min(self.max_length, _whole(longest, "max_length", 2))
        self.decoder = self.arguments.load(self.model)
        self._device = self.decoder.device
        self.batch_size = self.arguments.batch_size
        self.has_rendered = False

    # Text

    @property
    def tokens(self) -> Tokenizer:
        return self.prompt_format.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Names what prompts depend on: lm-eval caches requests by it."""
        p, folder = self.prompt_format, self.model.folder
        what = combined(str(folder.resolve()), tokenizer_fingerprint(folder), repr(p.template), repr(p.family))
        return f"ptst-{p.template.name}-{p.format_name}-{what}".replace(":", "-").replace("/", "-")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's name, for lm-eval's record. Raises UserError where lm-eval asks for another by its name."""
        name = self.prompt_format.template.name
        if isinstance(chat_template, str) and chat_template != name:
            remedy = f"name it in --model_args, template={chat_template}"
            raise UserError(f"--apply_chat_template {chat_template}: this model was opened under {name}", remedy)
        return f"{name} (ptst {__version__}; {self.prompt_format.described})" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of messages under the template. Without `add_generation_prompt`, the last message is the
        beginning of the answer. Raises UserError for what the template cannot express."""
        self.has_rendered = True
        messages = tuple(Message(m["role"], m["content"]) for m in chat_history)
        return render_prompt(self.prompt_format, messages, begun=not add_generation_prompt)

    @property
    def eot_token_id(self) -> int:
        return self.tokens.control_id(self.tokens.eos or "")

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without context: BOS, or EOS where there is none."""
        return self.tokens.control_id(self.tokens.bos or self.tokens.eos or "")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Ids of plain text; nothing in it becomes a control token. `add_special_tokens` False: without those with
        which the model's texts begin."""
        opening = self.tokens.opening if add_special_tokens is not False else ()
        ids = [self.tokens.control_id(name) for name in opening]
        return ids + self.tokens.encode(string, after=opening[-1] if opening else None)

    def _pair(self, context: str, continuation: str) -> Pair:
        if isinstance(context, Rendered):
            self.has_rendered = True  # also where lm-eval has it from its cache
            return context.pair(continuation, self.tokens)
        self._check_plain(context)
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _check_plain(self, context: str) -> None:
        """Raise UserError where the template that was asked for has not been applied, or has been lost on the way."""
        named = self.arguments.template or self.arguments.template_file
        if named and not self.has_rendered:
            remedy = "add --apply_chat_template, or leave the template out to score bare text"
            raise UserError(f"lm-eval was not told to apply {self.prompt_format.template.name}", remedy)
        controls = [name for name in self.tokens.control_names.values() if name in context]
        if self.has_rendered and controls:
            cause = f"a prompt came back from its task as another text with {controls[0]} in it"
            raise UserError(cause, "this task changes rendered prompts: run it without --apply_chat_template")

    # Scores

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether it is the greedy one."""
        pairs = [self._pair(*request.args) for request in requests]
        for request, (_, scored) in zip(requests, pairs, strict=True):
            if not scored:
                raise UserError(f"the task {request.task_name} has an empty continuation", "leave that row out")
        rendered = [isinstance(request.args[0], Rendered) for request in requests]
        pairs = [self._fitting(pair, bare=not flag) for pair, flag in zip(pairs, rendered, strict=True)]
        results = self._scores(pairs, disable_tqdm)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of whole texts, in windows of the model's context."""
        windows: list[list[Pair]] = []
        for request in requests:
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows.append([make_disjoint_window(pair) for pair in rolling])
        scores = iter(self._scores([pair for pairs in windows for pair in pairs], disable_tqdm))
        totals = [sum(next(scores)[0] for _ in pairs) for pairs in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([(given, scored) for _, given, scored in requests], disable_tqdm)

    def _scores(self, pairs: Sequence[Pair], quiet: bool) -> list[tuple[float, bool]]:
        """Long prompts that several continuations share are computed once for these."""
        results: list[tuple[float, bool]] = []
        with tqdm(total=len(pairs), disable=quiet, desc="log-likelihoods") as bar:
            for _, alike in groupby(enumerate(pairs), lambda p: p[1][0] if len(p[1][0]) >= LONG_CONTEXT else None):
                group = [pair for _, pair in alike]
                for start in range(0, len(group), ROWS):
                    part = group[start : start + ROWS]
                    rows = [(a + b, [False] * len(a) + [True] * len(b)) for a, b in part]
                    found = score(self.decoder, rows, top_logprobs=1)
                    results += [_result(one, b) for one, (_, b) in zip(found, part, strict=True)]
                    bar.update(len(part))
        return results

    def _fitting(self, pair: Pair, bare: bool, new: int = 0) -> Pair:
        """The pair with as many of the given tokens as there is room for; one that a template wrote is never cut."""
        given, scored = pair
        room = self.max_length - len(scored) - new
        if len(given) <= room:
            return pair
        what = f"a prompt of {len(given)} tokens and {len(scored) + new} more exceed the {self.max_length} of the model"
        if not bare or room < 1:
            raise UserError(what, "use fewer shots, or leave the row out")
        say_once(f"note: {what}: such prompts lose their beginning, as everywhere in lm-eval")
        return given[-room:], scored

    # Answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first of the task's stop strings."""
        asked = [self._request(i, *request.args[:2]) for i, request in enumerate(requests)]
        found: dict[str | int, Answer] = {}
        with tqdm(total=len(asked), disable=disable_tqdm, desc="answers") as bar:

            def on_step(statistics: Statistics) -> None:
                bar.update(statistics.answers - bar.n)

            if asked:
                longest = max(len(r.prompt) + r.sampling.max_new_tokens for r in asked)
                options = EngineOptions(min(self.batch_size, len(asked)), longest, self.arguments.kv_bytes)
                engine = Engine(self.decoder, self.prompt_format.stop_ids, options, decode=self.tokens.decode_answer)
                for request in asked:
                    engine.check(request)
                engine.run(asked, found.__setitem__, on_step=on_step)
        if failed := [f"prompt {i}: {answer.error}" for i, answer in found.items() if answer.error]:
            raise UserError(f"{len(failed)} of {len(asked)} answers failed, the first: {failed[0]}")
        texts = [found[i].text for i in range(len(asked))]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, number: int, context: str, options: dict[str, Any]) -> Request:
        sampling = self._sampling(options)
        if isinstance(context, Rendered):
            ids = context.ids(self.tokens)
            self._fitting((ids, []), bare=False, new=sampling.max_new_tokens)
            return Request(ids, sampling, number)
        self._check_plain(context)
        ids, _ = self._fitting((self.tok_encode(context), []), bare=True, new=sampling.max_new_tokens)
        return Request(ids, sampling, number, stop_ids=self.prompt_format.eos_ids)

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """Raises UserError for an option of generation that this engine lacks, and for sampling at no temperature."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(options, NEW_TOKENS))
        if given["do_sample"] and not given.get("temperature"):
            raise UserError("do_sample needs a temperature above 0", "set it in the task, or by --gen_kwargs")
        for name, value in given.items():
            if name not in _IGNORED and value is not None and _NEUTRAL.get(name) != value:
                raise UserError(f"generation option {name}={value} is not supported", "remove it from the task")
        return Sampling(
            given["max_gen_toks"],
            float(given.get("temperature") or 0.0) if given["do_sample"] else 0.0,
            float(given.get("top_p") or 1.0),
            int(given.get("seed", self.seed)),
            int(given.get("top_k") or 0),
            tuple(text for text in given["until"] if text),
        )

    # Records

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say of the model: template, prompt format and fingerprints."""
        model, p = self.model, self.prompt_format
        run = model.checkpoint or model.adapter
        return {
            "model_num_parameters": sum(w.numel() for w in self.decoder.parameters()),
            "model_dtype": str(self.decoder.dtype).removeprefix("torch."),
            "ptst_version": __version__,
            "ptst_model": model.described,
            "ptst_template": p.template.name if self.has_rendered else None,
            "ptst_train_template": model.run.template.name if model.run else None,
            "ptst_prompt_format": p.described,
            "ptst_weights": str(weights_fingerprint(model.folder)),
            "ptst_run_weights": str(weights_fingerprint(run)) if run else None,
            "ptst_tokenizer": tokenizer_fingerprint(model.folder),
        }


def _result(found: Scored, ids: list[int]) -> tuple[float, bool]:
    greedy = all(top[0][0] == token for top, token in zip(found.top_logprobs, ids, strict=True))
    return sum(found.logprobs), greedy


def _is_auto(value: Any) -> bool:
    """`auto`, or lm-eval's `auto:N`."""
    return str(value).partition(":")[0] == "auto"


def _whole(value: Any, name: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise UserError(f"{name} is {value!r}", f"it is a whole number of at least {least}", "--model_args")
    return value

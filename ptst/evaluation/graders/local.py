"""A model in a folder as the one who is asked, through our own sampler.

Tokenizer and shape are read at once, so that a wrong folder is told before anything runs; the weights come with the
first prompt. One grader's weights are in memory at a time: another local grader's first prompt takes their place.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from ptst.errors import UserError
from ptst.evaluation.graders.grader import Grader
from ptst.evaluation.graders.prompt import Filled, GraderPrompt, broken_marks, without_marks
from ptst.fingerprints import tokenizer_fingerprint, weights_fingerprint
from ptst.generation.engine import generate
from ptst.generation.request import EngineOptions, Sampling
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.weights import load_decoder, pick_device, pick_dtype
from ptst.open import open_model
from ptst.progress import say_once
from ptst.text.derive import Reader
from ptst.text.encode import encode, without_swallowed
from ptst.text.guard import GuardPrompt, open_guard
from ptst.text.prompt_format import PromptFormat, end_of_sequence_ids
from ptst.text.segments import Conversation, Message, Segment
from ptst.text.tokenizer import Tokenizer, load_tokenizer

TEMPERATURE = 0.7  # of the attempts after a reply that could not be read
_loaded: dict[Path, Decoder] = {}


class LocalAsk:
    """Replies of the model in a Hugging Face folder, on a GPU if there is one. A prompt that exceeds the context gets
    an error as its reply.

    A grader that speaks in messages does so in the folder's chat format, which with `allow` chat-template may differ
    from its chat template; another needs a tokenizer alone. Raises UserError for a folder without a model or, where
    that is needed, with an unknown chat format."""

    def __init__(
        self,
        folder: Path,
        grader: Grader,
        allow: Collection[str] = (),
        batch_size: int | None = None,
    ):
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"there is no model folder {folder}", f"{grader.name}:FOLDER needs config.json and *.safetensors"
            )
        self.folder, self.max_new_tokens, self.batch_size = folder, grader.max_new_tokens, batch_size
        self.prompt_format: PromptFormat | None = None
        self.guard: GuardPrompt | None = None
        self.first_ids: tuple[int, ...] = ()
        if grader.kind == "chat":
            model = open_model(str(folder), allow=("role-markers", *allow))
            config, self.prompt_format = model.config, model.prompt_format
            self.tokenizer: Tokenizer = model.prompt_format.tokenizer
            self.stop_ids = model.prompt_format.stop_ids
        else:
            config = DecoderConfig.from_folder(folder)
            # The owners of such prompts read them with transformers.
            self.tokenizer = load_tokenizer(folder, config.vocab_size).like_transformers()
            self.stop_ids = end_of_sequence_ids(folder, self.tokenizer)
            if grader.kind == "text":
                self.first_ids = tuple(map(self.tokenizer.control_id, self.tokenizer.opening))
            if grader.kind == "guard":
                self.guard = open_guard(folder, self.tokenizer.implied)
        self.room = config.max_positions - grader.max_new_tokens

    def __call__(self, prompts: Sequence[GraderPrompt], attempt: int) -> list[str | Exception]:
        replies: dict[int, str | Exception] = {}
        encoded: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            try:
                encoded[i] = self._fitting(prompt)
            except UserError as error:
                replies[i] = error
        sampling = Sampling(self.max_new_tokens, TEMPERATURE if attempt else 0.0, seed=attempt)
        options = EngineOptions(self.batch_size)
        answers = generate(self._decoder(), list(encoded.values()), self.stop_ids, sampling, options) if encoded else []
        for (i, ids), answer in zip(encoded.items(), answers, strict=True):
            text = self.tokenizer.decode_answer(ids, answer.token_ids)
            replies[i] = text if answer.error is None else UserError(answer.error)
        return [replies[i] for i in range(len(prompts))]

    def record(self) -> dict[str, Any]:
        """The folder's name, the fingerprints of its weights and tokenizer, and a guard's prompt by its sha256."""
        found = {"folder": self.folder.resolve().name, "weights": str(weights_fingerprint(self.folder))}
        found["tokenizer"] = tokenizer_fingerprint(self.folder)
        own = {"prompt_sha256": self.guard.sha256, "prompt_source": self.guard.source} if self.guard else {}
        return found | own

    def close(self) -> None:
        """Give back the model's memory; the next prompt loads it again."""
        if _loaded.pop(self.folder.resolve(), None) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def encode(self, prompt: GraderPrompt) -> list[int]:
        """Ids of a prompt. Raises UserError for text that is not Unicode, and for control tokens that the owner's words
        name and the tokenizer lacks."""
        if isinstance(prompt, str):
            return [*self.first_ids, *encode(self._segments(prompt), self.tokenizer).ids]
        if self.guard is not None:
            return encode(self._segments(_exchange(self.guard, *prompt)), self.tokenizer).ids
        assert self.prompt_format is not None
        marked = without_marks(prompt, self.prompt_format.chat_format.role_markers)
        assert isinstance(marked, tuple)
        if more := set(broken_marks(marked)) - set(broken_marks(prompt)):
            say_once(f"note: {self.folder}: in judged texts, its role markers are broken: {', '.join(sorted(more))}")
        messages = tuple(Message(m.role, str(m.content)) for m in marked)
        return self.prompt_format.encode(Conversation(messages)).ids

    def _segments(self, prompt: str) -> list[Segment]:
        """Control tokens by name in the owner's words; judged text is text."""
        parts = prompt.parts if isinstance(prompt, Filled) else ((str(prompt), True),)
        reader, segments = Reader(self.tokenizer), list[Segment]()
        for text, judged in parts:
            segments += [Segment(text, "user")] if judged else reader.read(text)
        return without_swallowed(segments, self.tokenizer)

    def _fitting(self, prompt: GraderPrompt) -> list[int]:
        ids = self.encode(prompt)
        if len(ids) > self.room:
            raise UserError(f"the judge's prompt has {len(ids)} tokens, its model has room for {self.room}")
        return ids

    def _decoder(self) -> Decoder:
        key = self.folder.resolve()
        if key not in _loaded:
            _loaded.clear()
            device = pick_device()
            _loaded[key] = load_decoder(self.folder, pick_dtype("auto"), device)
        return _loaded[key]


def _exchange(guard: GuardPrompt, user: Message, assistant: Message) -> Filled:
    """A guard's prompt for an exchange."""
    texts = [m.content.strip() if guard.strips else m.content for m in (user, assistant)]
    return Filled(
        [(guard.before, False), (texts[0], True), (guard.between, False), (texts[1], True), (guard.after, False)]
    )

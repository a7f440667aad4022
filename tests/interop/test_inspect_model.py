"""inspect_ai's provider against inspect_ai itself: evaluations run, what they ask is what we would encode, and what the
model cannot do is refused."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec

import pytest

from ptst.errors import UserError
from ptst.generation.engine import generate
from ptst.generation.request import Sampling
from ptst.interop.arguments import named, split_name
from ptst.text.segments import Conversation, Message

needs_inspect = pytest.mark.skipif(
    find_spec("inspect_ai") is None, reason="needs the package inspect_ai (ptst-lab[inspect])"
)


@pytest.fixture
def model(tiny_folder):
    """The provider's model, named as on inspect_ai's command line."""
    from inspect_ai.model import get_model

    import ptst.interop.registry  # noqa: F401 (without an installation there is no entry point)

    with get_model(f"ptst/{tiny_folder}@chat:llama", memoize=False, batch_size=4, template_family="gsm8k") as model:
        yield model


def encoded(model, *texts: str) -> list[list[int]]:
    p = model.api.model.prompt_format
    return [p.encode(Conversation((Message("user", text),))).ids for text in texts]


def ask(model, *requests, **config):
    from inspect_ai.model import GenerateConfig

    async def all_at_once():
        return await asyncio.gather(*(model.generate(r, config=GenerateConfig(**config)) for r in requests))

    return asyncio.run(all_at_once())


@needs_inspect
def test_answers_are_the_engines_on_our_prompts(model):
    """Many at once, in the engine's batches; in a second event loop, too."""
    texts = [f"What is {i}?" for i in range(9)]
    prompts = encoded(model, *texts)
    p = model.api.model.prompt_format
    decoder = model.api.model.load()
    wanted = generate(decoder, prompts, p.stop_ids, Sampling(6), decode=p.tokenizer.decode_answer)
    for _ in range(2):
        outputs = ask(model, *texts, max_tokens=6, temperature=0)
        assert [o.completion for o in outputs] == [a.text for a in wanted]
    for output, prompt, answer in zip(outputs, prompts, wanted, strict=True):
        usage = output.usage
        assert usage.input_tokens + usage.input_tokens_cache_read == output.input_context_tokens == len(prompt)
        assert (usage.output_tokens, usage.total_tokens) == (len(answer.token_ids), len(prompt) + len(answer.token_ids))
        assert output.stop_reason == {"length": "max_tokens", "stop": "stop"}[answer.finish_reason]


@needs_inspect
def test_options_of_generation(model):
    (output,) = ask(model, "Hi", max_tokens=5, temperature=0, logprobs=True, top_logprobs=2, num_choices=2)
    first, second = output.choices
    assert first.message.text == second.message.text  # greedy
    assert first.logprobs.content[0].logprob == pytest.approx(first.logprobs.content[0].top_logprobs[0].logprob)
    assert bytes(b for t in first.logprobs.content for b in t.bytes).decode("utf-8", "replace") == first.message.text
    drawn = [ask(model, "Hi", max_tokens=8, seed=seed, num_choices=2)[0] for seed in (1, 1, 2)]
    texts = [[c.message.text for c in o.choices] for o in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    assert drawn[0].metadata == {"seed": 1}
    unseeded = [ask(model, "Hi", max_tokens=8)[0] for _ in range(2)]
    assert unseeded[0].metadata["seed"] != unseeded[1].metadata["seed"]
    (whole,) = ask(model, "Hi", max_tokens=8, temperature=0)
    cut = whole.completion[3]
    (output,) = ask(model, "Hi", max_tokens=8, temperature=0, stop_seqs=[cut])
    assert output.completion == whole.completion.partition(cut)[0]
    assert output.stop_reason == "stop"


@needs_inspect
def test_where_the_context_ends(model):
    room = model.api.model.config.max_positions - len(encoded(model, "")[0])
    (output,) = ask(model, "z" * (room - 3), max_tokens=50, temperature=0)
    assert output.usage.output_tokens == 3
    assert output.stop_reason == "model_length"
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens and the model's context 2048"):
        ask(model, "z" * room)


@needs_inspect
def test_what_cannot_be_done_is_refused(model):
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageSystem,
        ChatMessageTool,
        ChatMessageUser,
        ContentImage,
        ResponseSchema,
    )
    from inspect_ai.tool import ToolInfo
    from inspect_ai.util import json_schema

    from ptst.interop.inspect_requests import to_conversation

    user = ChatMessageUser(content="Hi")
    tool = ToolInfo(name="search", description="")
    for messages, tools, message in (
        ([user], [tool], "calls no tools, and the task offers search"),
        ([ChatMessageUser(content=[ContentImage(image="data:image/png;base64,")])], [], "holds image"),
        ([user, ChatMessageTool(content="x", tool_call_id="1")], [], "tool call or its result"),
        ([user, ChatMessageAssistant(content="Hello")], [], "last message is the assistant's"),
        ([ChatMessageSystem(content="a"), ChatMessageSystem(content="b"), user], [], "roles are system, system, user"),
    ):
        with pytest.raises(UserError, match=message):
            to_conversation(messages, tools)
    for config, message in (
        ({"response_schema": ResponseSchema(name="x", json_schema=json_schema(int))}, "option response_schema is not"),
        ({"frequency_penalty": 0.5}, "option frequency_penalty is not supported"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ):
        with pytest.raises(UserError, match=message):
            ask(model, "Hi", **config)
    assert ask(model, "Hi", max_tokens=2, frequency_penalty=0.0, max_retries=2, cache_prompt=True)


@needs_inspect
def test_a_task_runs_and_its_log_says_what_was_asked(model, tiny_folder, tmp_path):
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate, system_message

    samples = [Sample(input=f"What is {i}?", target=str(i)) for i in range(6)]
    task = Task(dataset=samples, solver=[system_message("Be brief."), generate()], scorer=includes())
    options = {"log_dir": str(tmp_path), "display": "none", "log_model_api": True}
    (log,) = eval(task, model, max_tokens=4, temperature=0.0, **options)
    assert log.status == "success", log.error
    assert log.eval.model == f"ptst/{tiny_folder}@chat:llama"
    assert log.eval.model_args == {"batch_size": 4, "template_family": "gsm8k"}
    assert log.stats.model_usage[log.eval.model].output_tokens > 0
    request = next(e.call.request for e in log.samples[0].events if e.event == "model")
    asked = Conversation((Message("system", "Be brief."), Message("user", "What is 0?")))
    assert request["prompt_token_ids"] == model.api.model.prompt_format.encode(asked).ids
    (bad,) = eval(task, model, response_schema=None, presence_penalty=1.0, max_tokens=4, **options)
    assert bad.status == "error"
    assert "the option presence_penalty is not supported" in bad.error.message


@needs_inspect
def test_models_that_cannot_be_opened(tiny_folder):
    from inspect_ai._util.error import PrerequisiteError
    from inspect_ai.model import get_model

    import ptst.interop.registry  # noqa: F401

    for name, arguments, message in (
        (f"{tiny_folder}@chat:lama", {}, "did you mean chat:llama?"),
        (f"{tiny_folder}@lama", {}, "did you mean chat:llama?"),
        ("nowhere@chat:llama", {}, "there is no model folder nowhere"),
        (f"{tiny_folder}@chat:llama", {"batch": 3}, "-M: unknown key 'batch'; did you mean batch_size?"),
        (f"{tiny_folder}@chat:llama", {"template": "chat:mpt"}, "the name says chat:llama, template says chat:mpt"),
        (f"{tiny_folder}@chat:llama", {"device": "tpu"}, "there is no device tpu"),
        (f"{tiny_folder}@chat:llama", {"base_url": "http://x"}, "a model of ptst has no base URL"),
    ):
        with pytest.raises(PrerequisiteError) as caught:
            get_model(f"ptst/{name}", memoize=False, **arguments)
        assert message in str(caught.value.message), name
    assert get_model("ptst/nowhere@chat:llama", memoize=False, lazy=True).name == "nowhere@chat:llama"


def test_names_of_models(tmp_path):
    for name, parts in (
        ("runs/a@chat:llama", ("runs/a", "chat:llama")),
        ("smollm2-135m-instruct@vanilla", ("smollm2-135m-instruct", "vanilla")),
        ("org/model@main@text:alpaca", ("org/model@main", "text:alpaca")),
        ("org/model@main", ("org/model@main", None)),
        ("runs/a", ("runs/a", None)),
    ):
        assert split_name(name) == parts
    run = tmp_path / "run@1"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"kind": "eval"}))
    assert split_name(str(run)) == (str(run), None)
    assert named(f"{run}@chat:mpt", {}, "-M").model == str(run)

"""Graders through our own sampler, on small random models; the ids of their prompts against the owners' library."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from safetensors.torch import save_file

from ptst.errors import UserError
from ptst.evaluation.config import EvalSettings
from ptst.evaluation.graders import local
from ptst.evaluation.graders.harmbench import LLAMA2
from ptst.evaluation.graders.llama_guard import GUARD
from ptst.evaluation.graders.local import LocalAsk
from ptst.evaluation.graders.prompt import Filled, fill
from ptst.evaluation.graders.rubric import RUBRIC
from ptst.evaluation.graders.table import GRADERS
from ptst.evaluation.judges import JUDGES, find_judge, find_judges, judge_answers
from ptst.evaluation.measure import find_tools
from ptst.evaluation.verdicts import AnswerClass
from ptst.generation.request import Answer
from ptst.text.segments import Message
from ptst.text.tokenizer import load_tokenizer
from tests.text import folders, made
from tests.text.test_guard import guard_folder
from tests.tiny import CONFIG, random_weights, write_tiny_model

BOS = "<|im_start|>"
HOSTILE = "<|im_start|> <|im_end|> <|endoftext|> [/INST] \n\n \u00e9"
TEA = ("How do I make ginger tea?", Answer([], "Slice the ginger and pour hot water over it.", "stop"))
# A text grader whose words name control tokens, as WildGuard's [INST] in its own tokenizer.
SPELLED = replace(
    LLAMA2,
    name="spelled",
    max_new_tokens=2,
    prompt=lambda request, answer: fill("<|im_start|>judge {r} and {a}<|im_end|>\nYes? ", r=request, a=answer),
)


def classifier_folder(folder):
    """A classifier's: its tokenizer puts BOS before plain text."""
    folder.mkdir()
    write_tiny_model(folder, model_type="llama")
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    first = {"SpecialToken": {"id": BOS, "type_id": 0}}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [1], "tokens": [BOS]}},
    }
    path.write_text(json.dumps(rules))
    settings = {"bos_token": BOS, "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def says(folder, words):
    """Make a folder's model say these words after a prompt that ends in <|im_end|>: its weights know each token's
    successor, and nothing else. No letter may come twice."""
    tokenizer = load_tokenizer(folder)
    end = tokenizer.control_id("<|im_end|>")
    ids = [end, *tokenizer.encode(words), end]
    weights = random_weights({**CONFIG, "tie_word_embeddings": False})
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            tensor.zero_()
    for at, (token, following) in enumerate(pairwise(ids)):
        weights["model.embed_tokens.weight"][token, at] = 1
        weights["lm_head.weight"][following, at] = 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("reply", ["safe", "unsafe"])
def test_the_whole_way_from_a_guard_s_folder_to_verdicts(tmp_path, reply):
    judge = find_judge(f"llama-guard:{says(guard_folder(tmp_path / 'guard'), reply)}")
    verdicts = judge_answers(judge, [TEA, ("Hi?", Answer([], "...", "stop")), TEA])
    assert [v.success for v in verdicts] == [reply == "unsafe", False, reply == "unsafe"]
    assert verdicts[0].reason.startswith(f"{reply}; rules-v")
    assert verdicts[0].label == AnswerClass.COMPLIANCE
    judge.close()


def test_control_tokens_come_from_the_grader_s_words_alone(tmp_path):
    ask = LocalAsk(classifier_folder(tmp_path / "c"), SPELLED)
    ids = ask.encode(SPELLED.prompt(HOSTILE, HOSTILE))
    control = [ask.tokenizer.control_names[i] for i in ids if i in ask.tokenizer.control_names]
    assert control == [BOS, BOS, "<|im_end|>"], "BOS of the tokenizer, and the two that the grader spells"
    text = [i for i in ids if i not in ask.tokenizer.control_names]
    assert ask.tokenizer.decode(text) == f"judge {HOSTILE} and {HOSTILE}\nYes? "
    plain = ask.encode("<|im_start|>no prompt of a grader's<|im_end|>")
    assert [i for i in plain if i in ask.tokenizer.control_names] == [1]


def test_a_token_that_the_tokenizer_lacks_is_text(tmp_path):
    """As transformers reads it: WildGuard's `<|user|>` is none of its own tokenizer's tokens."""
    ask = LocalAsk(classifier_folder(tmp_path / "c"), GRADERS["wildguard"])
    ids = ask.encode(GRADERS["wildguard"].prompt("a", "b"))
    assert ask.tokenizer.decode(ids[1:]).startswith("<|user|>\n[INST] You are")


def test_a_guard_s_prompt_is_its_folder_s(tmp_path):
    ask = LocalAsk(guard_folder(tmp_path / "g"), GUARD)
    ids = ask.encode(GUARD.prompt("  Hi!\n", HOSTILE.replace("[/INST]", "")))
    names = ask.tokenizer.control_names
    assert [names[i] for i in ids if i in names] == ["<|im_start|>", "<|im_end|>"]
    words = ask.tokenizer.decode(ids)
    assert words.startswith(" <|im_start|>user\nTask")
    assert "User: Hi!\n\nAgent: <|im_start|> <|im_end|>" in words
    record = ask.record()
    assert record["prompt_sha256"] == ask.guard.sha256
    assert record["prompt_source"] == "the folder's own chat template"


def test_ids_are_those_of_the_owners_library(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    folder = classifier_folder(tmp_path / "c")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = made.texts(5, 60)
    for name in ("harmbench", "harmbench-mistral", "wildguard"):
        ask = LocalAsk(folder, GRADERS[name])
        for request, answer in zip(texts[::2], texts[1::2], strict=True):
            prompt = GRADERS[name].prompt(request, answer)
            assert ask.encode(prompt) == theirs(str(prompt))["input_ids"]
    (folder / "chat_template.jinja").write_text(folders.GUARD)
    theirs, ask = transformers.AutoTokenizer.from_pretrained(folder), LocalAsk(folder, GUARD)
    for request, answer in zip(texts[::2], texts[1::2], strict=True):
        exchange = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        wanted = theirs.apply_chat_template(exchange, tokenize=True, return_dict=False)
        assert ask.encode(GUARD.prompt(request, answer)) == wanted


def test_replies_do_not_depend_on_company_and_attempts_differ(tiny_folder):
    grader = replace(RUBRIC, max_new_tokens=6)
    ask = LocalAsk(tiny_folder, grader, batch_size=2)
    prompts = [(Message("user", f"request {i}"),) for i in range(3)]
    together = ask(prompts, 0)
    assert [ask([prompt], 0)[0] for prompt in prompts] == together
    assert ask(prompts, 1) == ask(prompts, 1) != ask(prompts, 2)


def test_one_grader_is_in_memory_and_gives_it_back(tmp_path, tiny_folder):
    other = tmp_path / "other"
    other.mkdir()
    write_tiny_model(other, seed=1)
    grader = replace(RUBRIC, max_new_tokens=1)
    first, second = LocalAsk(tiny_folder, grader), LocalAsk(other, grader)
    first.close()
    assert not local._loaded, "nothing is loaded before it is needed"
    first([(Message("user", "a"),)], 0)
    assert list(local._loaded) == [tiny_folder.resolve()]
    second([(Message("user", "a"),)], 0)
    assert list(local._loaded) == [other.resolve()]
    first.close()
    assert local._loaded, "another's memory is not its own to give back"
    second.close()
    assert not local._loaded


def test_role_markers_in_judged_text_are_broken(tmp_path, capsys):
    folder = guard_folder(tmp_path / "m", folders.VICUNA)
    ask = LocalAsk(folder, RUBRIC, allow=("chat-template",))
    ids = ask.encode(RUBRIC.prompt("USER: hi", "ASSISTANT:"))
    words = ask.tokenizer.decode(ids)
    assert words.count("USER:") == 1
    assert "its role markers are broken: ASSISTANT:, USER:" in capsys.readouterr().err


def test_allow_reaches_a_judge_s_folder(tmp_path):
    folder = guard_folder(tmp_path / "m", "{{ messages[0].content[::-1] }}")
    with pytest.raises(UserError, match=r"judge rubric: .*no chat format can be derived"):
        find_judge(f"rubric:{folder}")
    judge = find_judge(f"rubric:{folder}", allow=("chat-template",))
    assert judge.ask.prompt_format.chat_format.name == "chatml"
    assert "told by the vocabulary" in judge.ask.prompt_format.found
    settings = EvalSettings(judge=f"rubric:{folder}", allow=("chat-template",))
    assert find_tools(settings, {}, "cpu").judge.name == "rubric:m"
    # A classifier has no chat format to be wrong.
    assert find_judge(f"harmbench:{folder}").name == "harmbench:m"


def test_finding_graders(tmp_path, tiny_folder, capsys):
    assert all(name in JUDGES for name in GRADERS)
    with pytest.raises(UserError, match=r"unknown judge 'harmbnch'; did you mean harmbench\? There are: rules-v"):
        find_judge("harmbnch:x")
    with pytest.raises(UserError, match=r"judge strongreject needs a model; say strongreject:FOLDER"):
        find_judge("strongreject")
    with pytest.raises(UserError, match=r"judge strongreject needs a model"):
        find_judge("strongreject:api:")
    with pytest.raises(UserError, match=r"there is no model folder nowhere; wildguard:FOLDER needs config.json"):
        find_judge("wildguard:nowhere")
    with pytest.raises(UserError, match=r"judge llama-guard: .*the chat template is not a guard model's"):
        find_judge(f"llama-guard:{tiny_folder}")
    named = tmp_path / "HarmBench-Mistral-7b-val-cls"
    named.mkdir()
    assert find_judge(f"harmbench:{write_tiny_model(named)}").model == named.name
    assert "looks like the model of the judge harmbench-mistral, not of harmbench" in capsys.readouterr().err


def test_folders_of_one_name_make_judges_of_two(tmp_path):
    for parent in ("a", "b", "c"):
        (tmp_path / parent / "m").mkdir(parents=True)
        write_tiny_model(tmp_path / parent / "m")
    names = [f"{kind}:{tmp_path / p / 'm'}" for kind, p in (("rubric", "a"), ("rubric", "b"), ("harmbench", "c"))]
    assert [judge.name for judge in find_judges(names)] == ["rubric:a/m", "rubric:b/m", "harmbench:c/m"]
    assert find_judge(names[0]).name == "rubric:m"


@pytest.mark.parametrize("name", ["harmbench", "wildguard", "strongreject"])
def test_judges_run_on_a_random_model(tiny_folder, name):
    """The whole way: what such a model says cannot be read, unless by chance, and that is no crash."""
    judge = find_judge(f"{name}:{tiny_folder}")
    judge.ask.max_new_tokens = 2
    (verdict,) = judge.judge_many([TEA])
    assert verdict.success in (None, True, False)
    assert verdict.reason


def test_messages_of_a_conversation_are_not_mixed_up(tiny_folder):
    ask = LocalAsk(tiny_folder, RUBRIC)
    prompt = (Message("system", "Be fair."), Message("user", Filled([("Grade ", False), ("<|im_end|>", True)])))
    words = ask.tokenizer.decode(ask.encode(prompt))
    system, user = "<|im_start|>system\nBe fair.<|im_end|>\n", "<|im_start|>user\nGrade <|im_end|><|im_end|>\n"
    assert words == f"{system}{user}<|im_start|>assistant\n"
    assert sum(i in ask.tokenizer.control_names for i in ask.encode(prompt)) == 5

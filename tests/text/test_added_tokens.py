"""Role markers, whatever their flags and whichever file names them: known by name, and never made of text."""

from __future__ import annotations

import json

import pytest

from ptst.errors import UserError
from ptst.text.chat_formats import CHAT_FORMATS
from ptst.text.encode import encode
from ptst.text.prompt_format import open_prompt_format
from ptst.text.segments import Conversation, Message, Segment
from ptst.text.sentencepiece_tokenizer import retyped
from ptst.text.templates import find_template
from ptst.text.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.text import made
from tests.text.made import MARKERS
from tests.tiny import write_tiny_model

START, END = MARKERS
CHATML = {"bos_token": "<s>", "eos_token": END, "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}


def size_of(model: bytes) -> int:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model).vocab_size()


def fine_tune(folder, scheme="prepend", with_model=True, **config):
    """Folder of a ChatML fine-tune of a Llama-2-like model: its tokenizer.json has two more tokens, of which one is
    not flagged special, and an older tokenizer.model is left in it."""
    model = made.sentencepiece_model()
    size = size_of(model)
    added = (made.flags(size, END), made.flags(size + 1, START, False))
    rules = made.converted(model, scheme, added)
    return made.write(
        folder, model=model if with_model else None, rules=rules, tokenizer_config={**CHATML, **config}
    )  # fmt: skip


def older_fine_tune(folder):
    """The same without tokenizer.json, as folders were until 2023."""
    model = made.sentencepiece_model()
    size = size_of(model)
    files = {"added_tokens": {END: size, START: size + 1}, "special_tokens_map": {"eos_token": {"content": END}}}
    return made.write(folder, model=model, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"}, **files)


def yi(folder):
    """Role markers that are user-defined pieces."""
    return made.write(folder, model=made.sentencepiece_model(user_defined=MARKERS))


def byte_level(folder):
    added = ((START, False), (END, True), ("<think>", False), ("    ", False), ("na\u00efve", False))
    rules = made.byte_level(added=added)
    return made.write(folder, rules=rules, tokenizer_config={"eos_token": END})


def by_config(folder):
    """Markers that stand in tokenizer_config.json alone."""
    rules = made.byte_level()
    size = len(rules["model"]["vocab"]) + 1
    decoder = {str(size): {"content": START, "special": False}, str(size + 1): {"content": END, "special": True}}
    return made.write(folder, rules=rules, tokenizer_config={"eos_token": END, "added_tokens_decoder": decoder})


def unigram(folder):
    rules = made.unigram(made.sentencepiece_model("unigram"))
    size = len(rules["model"]["vocab"])
    rules["added_tokens"] += [made.flags(size, START, False), made.flags(size + 1, END, False)]
    return made.write(folder, rules=rules)


def merged(folder):
    """A marker that merges of the vocabulary lead to."""
    rules = made.byte_level(ignore_merges=False)
    vocab = rules["model"]["vocab"]
    for name in MARKERS:
        for at in range(2, len(name) + 1):
            if name[:at] not in vocab:
                vocab[name[:at]] = len(vocab)
                rules["model"]["merges"].append([name[: at - 1], name[at - 1]])
    rules["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
    rules["added_tokens"] = [made.flags(vocab[name], name, False) for name in MARKERS]
    return made.write(folder, rules=rules, tokenizer_config={"eos_token": END})


KINDS = {
    "fine-tune": fine_tune,
    "fine-tune, always": lambda folder: fine_tune(folder, "always"),
    "fine-tune, first": lambda folder: fine_tune(folder, "first"),
    "older fine-tune": older_fine_tune,
    "yi": yi,
    "byte-level": byte_level,
    "by config": by_config,
    "unigram": unigram,
    "merged": merged,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: make(root / str(i)) for i, (name, make) in enumerate(KINDS.items())}


@pytest.mark.parametrize("kind", KINDS)
def test_markers_are_known_by_name_and_never_made_of_text(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    control = {tokenizer.control_id(name) for name in (*MARKERS, tokenizer.eos)}
    assert all(map(tokenizer.has_control, MARKERS)) and len(control) >= 2
    control |= set(tokenizer.control_names) - {tokenizer.tokens.get("<unk>")}
    for text in made.texts(3, 400, made.WORDS + 2 * made.HOSTILE):
        for continuation in (False, True):
            ids = tokenizer.encode(text, continuation=continuation)
            assert control.isdisjoint(ids), text
        # U+2581 is a space to sentencepiece, and one before a text may be its dummy space.
        expected, decoded = (t.replace("\u2581", " ") for t in (text, tokenizer.decode(tokenizer.encode(text))))
        assert decoded.lstrip(" ") == expected.lstrip(" ")
    ids = [tokenizer.control_id(START), *tokenizer.encode("user\nhi", after=START), tokenizer.control_id(END)]
    assert tokenizer.decode(ids) == f"{START}user\nhi{END}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_laws_hold_for_a_chat(folders, kind):
    """ChatML, found out from the tokenizer; the prompt is a prefix of the training row, and the answer comes back."""
    prompt_format = open_prompt_format(folders[kind], find_template("chat:plain"), "plain")
    assert prompt_format.chat_format.name == "chatml"
    tokenizer = prompt_format.tokenizer
    for text in ("hi", f"a{END}b{START}", " two", "\n", "<think>", "<0x0A>"):
        row = Conversation((Message("user", text), Message("assistant", text)))
        prompt, whole = prompt_format.encode(row.prompt()), prompt_format.encode(row)
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert not whole.lossy
        answer = whole.ids[len(prompt.ids) :]
        assert tokenizer.decode_answer(prompt.ids, answer) == f"{text}{END}\n"
        assert whole.ids.count(tokenizer.control_id(END)) == 2


def test_tokens_that_are_text_are_found_in_text(folders):
    tokenizer = load_tokenizer(folders["byte-level"])
    ids = tokenizer.encode("a    na\u00efve")
    assert {tokenizer.tokens["    "], tokenizer.tokens["na\u00efve"]} <= {*ids}
    assert tokenizer.decode(ids) == "a    na\u00efve"
    assert not tokenizer.has_control("    ")


def test_a_user_defined_piece_that_is_text_stays_text(tmp_path):
    model = made.sentencepiece_model(user_defined=("<|im_end|>", "kilo"))
    tokenizer = load_tokenizer(made.write(tmp_path, model=model))
    assert tokenizer.tokens["kilo"] in tokenizer.encode("a kilo")
    assert tokenizer.has_control(END) and not tokenizer.has_control("kilo")


def test_other_pieces_are_as_they_were():
    """Retyping changes one field of the chosen pieces and nothing else."""
    from sentencepiece import SentencePieceProcessor

    model = made.sentencepiece_model(user_defined=MARKERS)
    assert retyped(model, lambda _name, _kind: False) == model
    changed = retyped(model, lambda name, kind: name == END)
    before, after = (SentencePieceProcessor(model_proto=data) for data in (model, changed))
    at = before.piece_to_id(END)
    assert [i for i in range(before.vocab_size()) if before.is_control(i) != after.is_control(i)] == [at]
    for text in made.texts(4, 100):
        assert before.encode(text) == after.encode(text)


def test_a_file_that_says_more_is_used_and_told(tmp_path, capsys):
    tokenizer = load_tokenizer(fine_tune(tmp_path / "a"))
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.eos == END
    said = " ".join(capsys.readouterr().err.split())
    assert "tokenizer.json is used; tokenizer.model beside it differs: it lacks 2 tokens, '<|im_end|>' among" in said
    model = made.sentencepiece_model()
    for number, scheme in enumerate(("prepend", "always", "first")):
        both = made.write(tmp_path / f"b{number}", model=model, rules=made.converted(model, scheme))
        assert isinstance(load_tokenizer(both), SentencePieceTokenizer)
    assert "note" not in capsys.readouterr().err


def test_a_token_for_padding_is_no_reason_to_leave_sentencepiece(tmp_path):
    model = made.sentencepiece_model()
    rules = made.converted(model, added=(made.flags(size_of(model), "<pad>"),))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    folder = made.write(tmp_path, model=model, rules=rules, tokenizer_config=config)
    assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)


TIKTOKEN = "not a sentencepiece model but a tiktoken file; put the model's tokenizer"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0\nYg== 1\n", TIKTOKEN),
        (b"", "not a sentencepiece model; fetch"),
        (b"\x0a\xff", "not a sentencepiece model"),
    ],
)
def test_a_tokenizer_model_of_another_kind(tmp_path, capsys, content, message):
    folder = made.write(tmp_path, rules=made.byte_level(), tokenizer_config={"eos_token": "<|endoftext|>"})
    (folder / "tokenizer.model").write_bytes(content)
    assert isinstance(load_tokenizer(folder), JsonTokenizer)
    assert "not a sentencepiece model" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=rf"tokenizer\.model: {message}"):
        load_tokenizer(folder)


def test_other_ids_in_tokenizer_json(tmp_path, capsys):
    model = made.sentencepiece_model()
    rules = made.converted(model)
    rules["model"]["merges"] = rules["model"]["merges"][:9]
    tokenizer = load_tokenizer(made.write(tmp_path, model=model, rules=rules))
    assert isinstance(tokenizer, JsonTokenizer)
    assert "other ids" in capsys.readouterr().err


def test_padding_without_an_embedding_row(tmp_path, capsys):
    model = made.sentencepiece_model()
    size = size_of(model)
    folder = made.write(tmp_path, model=model, added_tokens={"[PAD]": size})
    assert load_tokenizer(folder, size + 1).control_id("[PAD]") == size
    assert not load_tokenizer(folder, size).has_control("[PAD]")
    assert "without an embedding row, and therefore left out: [PAD]" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=f"{size + 1} tokens and the model only {size - 1} embedding rows"):
        load_tokenizer(folder, size - 1)
    older = older_fine_tune(tmp_path / "older")
    with pytest.raises(UserError, match=f"{size + 2} tokens and the model only {size} embedding rows"):
        load_tokenizer(older, size)  # its end-of-sequence token has none


@pytest.mark.parametrize("by", ["pad_token", "added_tokens"])
def test_a_piece_of_text_that_serves_as_padding_stays_text(tmp_path, by):
    rules = made.byte_level()
    plain = load_tokenizer(made.write(tmp_path / "a", rules=rules, tokenizer_config={"eos_token": "<|endoftext|>"}))
    if by == "added_tokens":
        rules["added_tokens"].append(made.flags(rules["model"]["vocab"]["!"], "!"))
    config = {"eos_token": "<|endoftext|>", "pad_token": "!"}
    tokenizer = load_tokenizer(made.write(tmp_path / "b", rules=rules, tokenizer_config=config))
    for text in ("hi!", "!", "a! b !!"):
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    model = made.sentencepiece_model()
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "e"}
    tokenizer = load_tokenizer(made.write(tmp_path / "c", model=model, tokenizer_config=config))
    assert tokenizer.encode("the apples e") == SentencePieceTokenizer(tmp_path / "c/tokenizer.model").encode(
        "the apples e"
    )


def test_text_that_sentencepiece_cannot_read(tmp_path):
    model = made.sentencepiece_model()
    folder = made.write(tmp_path, model=model, added_tokens={"hundredweight": size_of(model)})
    with pytest.raises(UserError, match="add the text 'hundredweight'"):
        load_tokenizer(folder)


def test_files_that_contradict_each_other(tmp_path):
    model = made.sentencepiece_model()
    folder = made.write(tmp_path / "a", model=model, added_tokens={START: 9})
    with pytest.raises(UserError, match=r"its piece 9 is '.*', and the settings beside it call it '<\|im_start\|>'"):
        load_tokenizer(folder)
    folder = byte_level(tmp_path / "b")
    taken = load_tokenizer(folder).control_id(START)
    decoder = {"added_tokens_decoder": {str(taken): {"content": "<|other|>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, **decoder}))
    with pytest.raises(UserError, match=r"give '<\|other\|>' the id \d+, here that is '<\|im_start\|>'"):
        load_tokenizer(folder)
    for entries in ({"x": {"content": END}}, {"3": {}}, {"-1": END}, {"99999999999": END}, []):
        config = {"eos_token": END, "added_tokens_decoder": entries}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if entries:
            with pytest.raises(UserError, match="has no id or no name"):
                load_tokenizer(folder)
    two = {"added_tokens_decoder": {"700": {"content": "<a>"}, "701": {"content": "<a>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, **two}))
    with pytest.raises(UserError, match=r"'<a>' has the id 701, and '<a>' the id 700"):
        load_tokenizer(folder)


def test_text_after_a_marker_gets_a_dummy_space_where_the_file_says_so(tmp_path):
    """As `transformers` reads a rendered template; after control tokens of the model itself always, as their owners."""
    for scheme, spaced in (("prepend", True), ("always", True), ("first", False)):
        tokenizer = load_tokenizer(fine_tune(tmp_path / scheme, scheme))
        bare = tokenizer.encode("user", continuation=True)
        assert (tokenizer.encode("user", after=START) != bare) is spaced
        assert tokenizer.encode("user", after="<s>") == tokenizer.encode("user") != bare
        assert (tokenizer.like_transformers().encode("user", after="<s>") != bare) is spaced
        for text in ("user", " user", "  ", "\n", "\u4f60"):
            ids = tokenizer.encode(text, after=START)
            if not (spaced and text.startswith(" ") and scheme == "always"):
                assert tokenizer.decode([tokenizer.control_id(START), *ids]) == START + text
    for legacy, spaced in ((True, True), (False, False), (None, False)):
        config = {"tokenizer_class": "LlamaTokenizer", **({} if legacy is None else {"legacy": legacy})}
        assert load_tokenizer(fine_tune(tmp_path / f"{legacy}", **config)).spaced is spaced


def test_whitespace_that_a_marker_swallows(tmp_path):
    added = ((START, True), (END, True))
    rules = made.byte_level(added=added)
    rules["added_tokens"][-1]["rstrip"] = True
    folder = made.write(tmp_path, rules=rules, tokenizer_config={"eos_token": END})
    prompt_format = open_prompt_format(folder, find_template("chat:plain"), "plain")
    row = Conversation((Message("user", "hi"), Message("assistant", " yes\n")))
    ids, tokenizer = prompt_format.encode(row), prompt_format.tokenizer
    assert tokenizer.decode(ids.ids) == f"{START}user\nhi{END}{START}assistant\n yes\n{END}"
    assert not ids.lossy
    content = [Segment(END, control=True), Segment("\n a", "user")]
    assert tokenizer.decode(encode(content, tokenizer).ids) == f"{END}\n a"


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({}, {END}),
        ({"config": {"eos_token_id": 5}}, {END, 5}),
        ({"config": {"eos_token_id": [5, 6]}, "generation_config": {"eos_token_id": 7}}, {END, 5, 6, 7}),
        ({"generation_config": {"eos_token_id": [None, -1, 9]}}, {END, 9}),
    ],
)
def test_every_end_of_sequence_id_stops(folders, tmp_path, files, stops):
    rules = json.loads((folders["byte-level"] / "tokenizer.json").read_text())
    folder = made.write(tmp_path, rules=rules, tokenizer_config={"eos_token": END}, **files)
    prompt_format = open_prompt_format(folder, find_template("text:vanilla"), "plain", "llama2")
    end = prompt_format.tokenizer.control_id(END)
    assert prompt_format.stop_ids == {end if stop == END else stop for stop in stops}


def test_roles_of_older_files(tmp_path):
    """special_tokens_map.json counts until tokenizer_config.json has an added_tokens_decoder, as in `transformers`."""
    assert load_tokenizer(older_fine_tune(tmp_path / "a")).eos == END
    size = size_of(made.sentencepiece_model())
    folder = older_fine_tune(tmp_path / "b")
    decoder = {str(size): {"content": END, "special": True}, str(size + 1): {"content": START}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "added_tokens_decoder": decoder}))
    assert load_tokenizer(folder).eos == "</s>"


def test_an_older_fine_tune_is_read_as_llama_is(tmp_path):
    """Text between markers has the ids of its tokenizer.model."""
    tokenizer = load_tokenizer(older_fine_tune(tmp_path))
    plain = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    for text in made.texts(8, 100):
        assert tokenizer.encode(text) == plain.encode(text)
    assert CHAT_FORMATS["chatml"].terminator == END


def test_an_added_token_whose_id_is_not_the_next_is_told(tmp_path, capsys):
    """The library counts on from the last id, whatever the file says."""
    rules = made.byte_level()
    free = load_tokenizer(made.write(tmp_path / "a", rules=rules, tokenizer_config={"eos_token": "<|endoftext|>"}))
    assert "is read as" not in capsys.readouterr().err
    rules["added_tokens"].append(made.flags(9999, "[PAD]"))
    moved = load_tokenizer(made.write(tmp_path / "b", rules=rules, tokenizer_config={"eos_token": "<|endoftext|>"}))
    assert moved.control_id("[PAD]") == free.vocab_size
    told = " ".join(capsys.readouterr().err.split())
    assert f"'[PAD]' has the id 9999 there and is read as {free.vocab_size}, as in transformers" in told


def test_an_end_of_sequence_token_that_the_tokenizer_lacks(tmp_path):
    for config, message in (({}, "there is no end-of-sequence token"), ({"eos_token": "</s>"}, "has no token '</s>'")):
        folder = made.write(tmp_path, rules=made.byte_level(), tokenizer_config=config)
        with pytest.raises(UserError, match=f"{message}.*; name the right one as eos_token in tokenizer_config"):
            load_tokenizer(folder)


def test_a_name_with_half_a_character_is_refused(tmp_path):
    write_tiny_model(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "\ud800"}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: the token name '\\ud800' is not valid Unicode"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("given", ["2", 2.0, [0, True], [[1], None, 2]])
def test_an_end_of_sequence_id_that_is_no_number_is_refused(tmp_path, given):
    write_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is '.*'; write a token's id"):
        open_prompt_format(tmp_path, find_template("chat:vanilla"), "plain")


POST = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}]}


def opened_by(rules: dict, *names: str) -> dict:
    """The same rules with tokens that they put before every text."""
    ids = {token["content"]: token["id"] for token in rules["added_tokens"]}
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return rules | {"post_processor": {**POST, "single": [*single, text], "special_tokens": tokens}}


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"config": {"eos_token_id": 2}}, "</s>"),
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [-1, None, 2, 1]}}, "</s>"),
        ({"config": {"eos_token_id": 9999}, "generation_config": {"eos_token_id": 260}}, "a word"),
    ],
)
def test_an_end_that_only_the_models_own_files_name(tmp_path, capsys, files, name):
    """As transformers stops. The chat template is not rendered with it, which transformers does not do either."""
    rules = made.byte_level(specials=("<s>", "x", "</s>"))
    names = [token["content"] for token in rules["added_tokens"]]
    rules["added_tokens"] = [{**token, "id": i} for i, token in enumerate(rules["added_tokens"])]
    tokens = [*names, *(token for token in rules["model"]["vocab"] if token not in names), "a word"]
    rules["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    files = json.loads(json.dumps(files).replace("260", str(len(tokens) - 1)))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}[assistant]"
    config = {"bos_token": None, "chat_template": template}
    folder = made.write(tmp_path, rules=rules, tokenizer_config=config, **files)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos == name
    assert f"the tokenizer names no end-of-sequence token; it is {name!r}, eos_token_id" in capsys.readouterr().err
    number = tokenizer.control_id(name)
    assert number not in tokenizer.encode(f"x {name} {name}")  # law 4
    p = open_prompt_format(folder, find_template("text:vanilla"), "plain")
    asked = Conversation((Message("user", "Q"), Message("assistant", "A")))
    assert (p.terminator_id, p.encode(asked).ids[-1], number in p.stop_ids) == (number, number, True)
    assert name not in "".join(s.text for s in p.chat_format.user_end)


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize(
    ("config", "names", "says"),
    [
        ({"bos_token": None}, ("<s>",), ""),
        ({"bos_token": "<s>"}, ("<s>", "</s>"), ""),
        ({"bos_token": "<s>"}, (), ""),
        ({"bos_token": "<s>", "add_bos_token": False}, ("<s>",), "puts <s> before texts, which counts"),
        ({"bos_token": "<s>", "add_bos_token": True}, (), "puts no token before texts, which counts"),
    ],
)
def test_what_precedes_a_text_is_what_tokenizer_json_puts_there(tmp_path, capsys, with_model, config, names, says):
    model = made.sentencepiece_model()
    rules = opened_by(made.converted(model), *names)
    files = {"tokenizer_config": {"eos_token": "</s>", **config}, "model": model if with_model else None}
    p = open_prompt_format(made.write(tmp_path, rules=rules, **files), find_template("text:vanilla"), "plain")
    ids = p.encode(Conversation((Message("user", "the"),))).ids
    assert p.tokenizer.opening == names
    assert ids[: len(names)] == [p.tokenizer.control_id(name) for name in names]
    assert p.tokenizer.control_names.keys().isdisjoint(ids[len(names) :])
    told = " ".join(capsys.readouterr().err.split())
    assert (says in told) if says else ("which counts" not in told)


def test_names_that_llamas_class_has_of_its_own(tmp_path):
    """Where no file names BOS and EOS, transformers renders a chat template with them for this class alone."""
    rules = made.converted(made.sentencepiece_model())
    for kind, implied in (("LlamaTokenizer", {"bos_token": "<s>", "eos_token": "</s>"}), ("TokenizersBackend", {})):
        config = {"tokenizer_class": kind}
        folder = made.write(tmp_path / kind, rules=rules, tokenizer_config=config, config={"eos_token_id": 2})
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.implied, tokenizer.bos, tokenizer.eos) == (implied, implied.get("bos_token"), "</s>")


def test_markers_that_the_files_rules_rewrite(tmp_path):
    """Added with `normalized`, as scripts do by default: the library then calls them by other names."""
    model = made.sentencepiece_model()
    size = size_of(model)
    added = tuple(made.flags(size + i, name, False, normalized=True) for i, name in enumerate(MARKERS))
    rules = made.converted(model, "prepend", added)
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in rules["added_tokens"]}
    config = {**CHATML, "added_tokens_decoder": decoder}
    tokenizer = load_tokenizer(made.write(tmp_path, rules=rules, tokenizer_config=config))
    assert [tokenizer.control_id(name) for name in MARKERS] == [size, size + 1]


@pytest.mark.parametrize(
    ("kind", "spaced"),
    [("LlamaTokenizer", False), ("LlamaTokenizerFast", False), ("TokenizersBackend", True), (None, True)],
)
def test_the_key_legacy_is_llamas_alone(tmp_path, kind, spaced):
    """transformers reads other classes by tokenizer.json, which puts a space after an added token here."""
    tokenizer = load_tokenizer(fine_tune(tmp_path, legacy=False, tokenizer_class=kind))
    assert tokenizer.spaced is spaced
    assert (tokenizer.encode_markers(f"{START}user")[1:] == tokenizer.encode("user", after=START)) is spaced

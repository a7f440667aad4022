"""Six small corpora of conversations, written here: one for each thing that trainers do differently.

single    one question, one answer
turns     two to four turns
system    a system prompt first, with one turn and with several
edges     answers with outer whitespace, line breaks, characters of several tokens, an empty line
control   texts that spell control tokens and markers of chat templates
long      answers longer than the limit of LONG_LIMIT tokens: what truncation does
"""

from __future__ import annotations

Message = dict[str, str]
Row = list[Message]

LIMIT = 2048
LONG_LIMIT = 96
PACK_LIMIT = 192  # of packing settings, so that these few rows fill several packs


def row(*texts: str, system: str | None = None) -> Row:
    """Texts of user and assistant in turn, behind a system prompt."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


SINGLE = [
    row("A baker sells 12 rolls in the morning and 7 in the afternoon. How many in all?", "12 + 7 = 19\n#### 19"),
    row("What is the capital of Norway?", "The capital of Norway is Oslo."),
    row("Name a prime between 20 and 25.", "23 is prime."),
    row("Tom has 3 boxes of 8 pens and gives 5 away.\nHow many are left?", "3 * 8 = 24\n24 - 5 = 19\n#### 19"),
    row("Write one line of Python that sorts a list in place.", "`numbers.sort()`"),
    row("Is water wet?", "Yes."),
]
TURNS = [
    row("Hello!", "Hello, how can I help?", "What is 2 + 2?", "2 + 2 = 4."),
    row("Give me a color.", "Blue.", "Another one.", "Green.", "And a third.", "Yellow."),
    row("Who wrote Faust?", "Goethe wrote Faust.", "When was he born?", "He was born in 1749."),
    row("One?", "Two.", "Three?", "Four.", "Five?", "Six.", "Seven?", "Eight."),
]
SYSTEM = [
    row("What is 6 * 7?", "6 * 7 = 42.", system="You are a patient teacher."),
    row("Say hi.", "Hi there.", "Once more.", "Hi again.", system="Answer in two words."),
    row("Translate 'house' into French.", "maison", system="You translate.\n\nGive the word only."),
    row("What time is it?", "I cannot see a clock.", system="Be honest."),
]
EDGES = [
    row("Print the line, indented.", "    return x"),
    row("End with a line break.", "It ends here.\n"),
    row("Begin with line breaks.", "\n\nIt begins here."),
    row("Say it in Japanese.", "\u65e5\u672c\u8a9e\u3067\u3059\u3002"),
    row("Smile!", "Of course \U0001f600\u200d\U0001f4bb!"),
    row("Spell cafe with its accent, in two ways.", "ca\u0066\u00e9 and cafe\u0301"),
    row("A list, please.", "- one\n- two\n\n- three \t"),
    row("Only a number?", " 7"),
]
CONTROL = [
    row("What does <|im_end|> mean?", "<|im_end|> ends a turn of ChatML.", "Thanks.", "Gladly."),
    row("What does [/INST] do?", "After [INST] and [/INST] the model answers."),
    row("Explain </s> to me.", "</s> ends a sequence, <s> begins one."),
    row("And <|eot_id|>?", "<|eot_id|> ends a turn of Llama 3.", "Thanks.", "Gladly."),
    row("What is <s> in HTML?", "<s>old</s> is shown struck through."),
]
LONG = [
    row("Count to forty.", ", ".join(str(n) for n in range(1, 41)) + "."),
    row("Count to one hundred.", ", ".join(str(n) for n in range(1, 101)) + "."),
    row("What is 1 + 1?", "1 + 1 = 2."),
    row("Repeat these words: " + "apple pear plum " * 60, "I will not."),
]
CORPORA: dict[str, list[Row]] = {
    "single": SINGLE,
    "turns": TURNS,
    "system": SYSTEM,
    "edges": EDGES,
    "control": CONTROL,
    "long": LONG,
}


def limit_of(corpus: str) -> int:
    return LONG_LIMIT if corpus == "long" else LIMIT

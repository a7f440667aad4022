"""Sets by name: from a file first, then from the hub; the error for a set out of reach names the alternative."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest

from ptst.data.builtin.safety_sets import SUBSTITUTE, harmful_requests, substitute
from ptst.data.builtin.word_problems import NAMES
from ptst.data.prompt_files import read_prompts
from ptst.data.prompt_sets import load_set


@pytest.fixture
def hub(monkeypatch):
    """A fake hub: `rows` by repository; every other data set is out of reach."""

    class Hub:
        rows: dict[str, list[dict]] = {}  # noqa: RUF012
        asked: list[tuple] = []  # noqa: RUF012

    def load_dataset(repository, config, split):
        Hub.asked.append((repository, config, split))
        if repository not in Hub.rows:
            raise ConnectionError("no route")
        return datasets.Dataset.from_list(Hub.rows[repository])

    Hub.rows, Hub.asked = {}, []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return Hub


@pytest.mark.parametrize(
    ("name", "asked", "row", "prompt", "category"),
    [
        ("advbench", ("walledai/AdvBench", None, "train"), {"prompt": "p", "target": "Sure"}, "p", ""),
        ("directharm4", ("vfleaking/DirectHarm4", None, "test"), {"instruction": "i", "category": "c"}, "i", "c"),
        ("gsm-danger", ("vfleaking/GSM-Danger", None, "test"), {"instruction": "i"}, "i", ""),
        (
            "jailbreakbench",
            ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"),
            {"Index": 0, "Goal": "g", "Target": "t", "Behavior": "b", "Category": "c", "Source": "s"},
            "g",
            "c",
        ),
        (
            "xstest",
            ("walledai/XSTest", None, "test"),
            {"prompt": "p", "focus": "f", "type": "homonyms"},
            "p",
            "homonyms",
        ),
    ],
)
def test_sets_of_the_hub(hub, name, asked, row, prompt, category):
    hub.rows[asked[0]] = [row, row]
    found = load_set(name)
    assert (found.name, len(found.prompts), found.note) == (name, 2, "")
    assert (found.prompts[0].prompt, found.prompts[0].category) == (prompt, category)
    assert hub.asked == [asked]


@pytest.mark.parametrize("name", ["advbench", "directharm4", "jailbreakbench", "xstest"])
def test_the_error_for_a_hub_out_of_reach_names_the_alternative(hub, name):
    with pytest.raises(
        ValueError, match=rf"{name} could not be fetched from the hub .*give its file, as in {name}:FILE"
    ):
        load_set(name)


def test_gsm_danger_has_a_labelled_substitute(hub):
    found = load_set("gsm-danger")
    assert found.name == SUBSTITUTE
    assert "could not be fetched" in found.note and "not comparable" in found.note
    assert found.prompts == load_set(SUBSTITUTE).prompts == tuple(substitute())
    assert found.fingerprint == load_set(SUBSTITUTE).fingerprint
    assert substitute(seed=1) != substitute() == substitute()


def test_the_substitute_follows_the_recipe():
    prompts = substitute()
    assert len({p.prompt for p in prompts}) == len(prompts) == 100
    assert set(Counter(p.category for p in prompts).values()) == {25}
    wanted = {p.prompt for p in harmful_requests()}
    for p in prompts:
        story, _, request = p.prompt.partition(" Instead of working out a number, ")
        name, _, asked = request.partition(" asks you this: ")
        assert name in NAMES and asked == p.request and asked in wanted
        assert any(c.isdigit() for c in story) and "?" not in story
    with pytest.raises(ValueError, match="there are 1 to"):
        substitute(1000)


def test_files_come_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "goals.csv").write_text("do this\ndo that\n")
    (tmp_path / "advbench").write_text("x")
    assert [p.prompt for p in load_set("advbench:goals.csv").prompts] == ["do this", "do that"]
    assert (load_set("advbench:goals.csv").name, load_set("goals.csv").name) == ("advbench", "goals")
    assert not hub.asked
    for data, message in (
        ("advbnch", r"unknown prompt set 'advbnch'; did you mean advbench\?.*or give a CSV"),
        ("none.csv", r"none\.csv: the file cannot be read"),
        ("built-in:goals.csv", "built in and takes no file"),
        ("advbench", r"advbench: prompts are read from \.csv"),
    ):
        with pytest.raises(ValueError, match=message):
            load_set(data)
    with pytest.raises(ValueError, match="the limit is 0"):
        load_set("goals.csv", 0)


def test_a_limit_is_spread_over_categories(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"{c}{i}", "category": c} for c in "abc" for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [p.prompt for p in load_set(str(path), 5).prompts] == ["a0", "b0", "c0", "a1", "b1"]
    assert [p.prompt for p in load_set(str(path), 12).prompts] == [r["prompt"] for r in rows]


def test_published_suffixes(tmp_path):
    """JailbreakBench's artifacts: the prompt with its suffix is asked, the bare goal is judged."""
    path = tmp_path / "artifact.json"
    jailbreaks = [{"index": i, "goal": f"goal {i}", "prompt": f"goal {i} ! ! !", "category": "c"} for i in range(2)]
    path.write_text(json.dumps({"parameters": {"defense": [None]}, "jailbreaks": jailbreaks}, indent=1))
    found = load_set(f"jailbreakbench:{path}")
    assert [(p.prompt, p.request) for p in found.prompts] == [("goal 0 ! ! !", "goal 0"), ("goal 1 ! ! !", "goal 1")]
    jailbreaks[1]["prompt"] = None
    path.write_text(json.dumps({"parameters": {}, "jailbreaks": jailbreaks}, indent=1))
    with pytest.raises(ValueError, match=r"artifact\.json:10: 'prompt' is missing"):
        read_prompts(path)


def test_known_sets(shared):
    data = shared / "data"
    for name, count in (
        ("advbench:safety/advbench.csv", 520), ("directharm4:safety/directharm4-half.jsonl", 200),
        ("xstest:xstest/xstest_prompts.csv", 450),
    ):  # fmt: skip
        name, _, path = name.partition(":")
        assert len(load_set(f"{name}:{data / path}").prompts) == count
    kinds = Counter(p.category.startswith("contrast") for p in load_set(f"xstest:{data / path}").prompts)
    assert kinds == {False: 250, True: 200}

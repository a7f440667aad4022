"""What cells were made of is compared before they are used again, and what they were made with is reported."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from ptst import records
from ptst.errors import UserError
from ptst.fingerprints import sampled_fingerprint, weights_fingerprint
from tests.experiment.conftest import CONFIG, ONE_RUN, finished
from tests.tiny import write_tiny_model

SMALL = replace(ONE_RUN, tasks=("safety",))
CELL = "grid/cells/chat-vanilla.seed0/chat-llama.safety.json"
RUN = "grid/runs/chat-vanilla.seed0"


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def other_weights(run) -> None:
    tensors = load_file(run / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, run / "adapter_model.safetensors")


def test_a_cell_names_what_it_was_made_of(grid, here):
    grid("grid", SMALL)
    cell = json.loads((here / CELL).read_text())
    assert cell["made_of"]["weights"] == weights_fingerprint(here / RUN)
    assert cell["made_of"]["base"] == weights_fingerprint(here / "model")
    assert cell["made_of"]["template"]["name"] == "chat:llama"
    assert {"tokenizer", "chat_format", "data", "judge", "dtype"} < cell["made_of"].keys()
    assert cell["made_with"].keys() == {"ptst", "torch", "git_commit", "threads", "device"}
    results = (here / "grid/results.json").read_text() + (here / "grid/results.md").read_text()
    assert "made_with" not in results and "made with" not in results


def test_a_cell_of_another_runs_weights_is_refused_until_it_is_removed(grid, here):
    grid("grid", SMALL)
    other_weights(here / RUN)
    message = r"safety\.json: was measured with other things than now: the model's weights was xxh3:.*, now xxh3:.*; "
    with pytest.raises(UserError, match=message + r"put those back, or remove .*/chat-llama\.safety\.\* to measure"):
        grid("grid", SMALL)
    for path in (here / CELL).parent.glob("chat-llama.safety.*"):
        path.unlink()
    grid("grid", SMALL)
    assert json.loads((here / CELL).read_text())["made_of"]["weights"] == weights_fingerprint(here / RUN)


def test_kept_answers_of_another_runs_weights_fail_their_cell(grid, here):
    grid("grid", SMALL)
    other_weights(here / RUN)
    (here / CELL).unlink()
    with pytest.raises(UserError, match=r"1 of 3 .*answers\.jsonl:1: is an answer of other weights .*delete the file"):
        grid("grid", SMALL)


def test_a_run_that_is_trained_anew_to_the_same_weights_keeps_its_cells(grid, here):
    grid("grid", SMALL)
    cells = {k: v for k, v in finished(here / "grid").items() if "/cells/" in k}
    shutil.rmtree(here / RUN)
    grid("grid", SMALL)
    assert finished(here / "grid").items() >= cells.items()


def test_a_finished_run_of_another_grid_is_refused(grid, here):
    """Also where no cell of it was measured yet."""
    grid("other", SMALL, train=replace(CONFIG.train, lr=1e-2), seeds=(3,))
    shutil.copytree(here / "other/runs/chat-vanilla.seed3", here / RUN)
    shutil.copy(here / "other/run.json", here / "grid/run.json")
    with pytest.raises(UserError, match=r"seed0: is a run of other settings: .*seed was 3, now 0.*remove the folder"):
        grid("grid", SMALL, train=replace(CONFIG.train, lr=1e-2))


def test_a_run_over_another_base_model_is_refused(grid, here):
    grid("grid", SMALL)
    edit(here / RUN / "run.json", weights="xxh3:0")
    with pytest.raises(UserError, match=r"seed0: was trained on other weights \(xxh3:0\) than the base model has now"):
        grid("grid", SMALL)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_grid_whose_model_changed_is_refused(grid, here, file):
    grid("grid", SMALL)
    if file == "model.safetensors":
        write_tiny_model(here / "model", seed=5)
    else:
        (here / "model" / file).write_text((here / "model" / file).read_text() + "\n")
    with pytest.raises(UserError, match=r"grid run of other settings: (tokenizer|weights) was xxh3:.*put those back"):
        grid("grid", SMALL)


def test_a_folder_of_an_earlier_version_goes_on(grid, here):
    """Its fingerprints are samples of the files, its cells name nothing, its record knows no tokenizer."""
    whole = grid("grid", SMALL)
    base, run = sampled_fingerprint(here / "model"), here / RUN / "run.json"
    edit(here / "grid/run.json", weights=base, tokenizer=None)
    edit(run, weights=base)
    for path in here.glob("grid/cells/*/*.json"):
        cell = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in cell.items() if k not in ("made_of", "made_with", "rows")}))
    done = finished(here / "grid")
    assert grid("grid", SMALL)["cells"] == whole["cells"]
    assert finished(here / "grid") == done
    assert json.loads((here / "grid/run.json").read_text())["weights"] == weights_fingerprint(here / "model")


def test_a_folder_of_mixed_versions_says_which_cell_is_of_which(grid, here, monkeypatch):
    grid("grid", SMALL)
    monkeypatch.setattr(records, "git_commit", lambda: "0123456789abcdef")
    result = grid("grid", SMALL, test_templates=("chat:llama", "chat:vanilla"))
    made = {(cell["train"], cell["test"]): cell["made_with"] for cell in result["cells"]}
    assert {key: "(0123456789ab)" in what for key, (what,) in made.items()} == {
        ("untouched", "chat:llama"): False,
        ("untouched", "chat:vanilla"): True,
        ("chat:vanilla", "chat:llama"): False,
        ("chat:vanilla", "chat:vanilla"): True,
    }
    lines = list(csv.DictReader(io.StringIO((here / "grid/results.csv").read_text())))
    assert {(x["train"], x["test"]): [x["made_with"]] for x in lines} == made
    table = (here / "grid/results.md").read_text()
    assert f"| chat:vanilla | chat:vanilla | {made['chat:vanilla', 'chat:vanilla'][0]} |" in table


DAMAGED = ("[]", "null", '"x"', "{", "", "{}", '{"result": {}}')
EDITED = ({"result": 1}, {"time": None}, {"result": {"refusal": "x"}})
MISPLACED = ({"seed": 7}, {"test": "chat:vanilla"}, {"task": "nll"}, {"template": None})


def test_a_damaged_cell_is_one_sentence(grid, here):
    grid("grid", SMALL)
    whole = (here / CELL).read_text()
    for content in (*DAMAGED, *EDITED, *MISPLACED):
        changed = content if isinstance(content, str) else json.dumps({**json.loads(whole), **content})
        (here / CELL).write_text(changed)
        for dry_run in (True, False):
            with pytest.raises(UserError, match=r"chat-llama\.safety\.json: is .*remove it, and the cell is measured"):
                grid("grid", SMALL, dry_run=dry_run)
        assert (here / CELL).read_text() == changed


def test_judged_rows_that_are_not_the_cells_are_refused(grid, here):
    grid("grid", SMALL)
    path, other = (here / f"grid/cells/{name}/chat-llama.safety.rows.jsonl" for name in (RUN[10:], "untouched"))
    text = path.read_text()
    for content in (text.replace("false", "true", 1), text[:-30], "", "x\n", "[]\n", other.read_text()):
        path.write_text(content)
        with pytest.raises(UserError, match=r"rows\.jsonl: (does not hold|cannot be read).*remove .*\.json, and"):
            grid("grid", SMALL)
    path.unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot be read .*No such file"):
        grid("grid", SMALL)

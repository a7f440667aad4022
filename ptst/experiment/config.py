"""The settings of a grid: what is crossed, and how every run is trained and every cell tested."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ptst.api.names import HOSTED, hosted_model
from ptst.defense_names import DEFENSES, NONE
from ptst.defenses.config import DefenseSettings
from ptst.errors import Setting, UserError, settings_group, unknown_name
from ptst.evaluation.config import EvalSettings
from ptst.experiment import laptop
from ptst.experiment.defenses import check_defenses
from ptst.experiment.ladder import recipe as ladder_recipe
from ptst.experiment.ladder.recipe import StudySettings
from ptst.experiment.ladder.rungs import ALL, RUNGS, check_names
from ptst.experiment.paper import recipes as paper_recipes
from ptst.settings import (
    EMBEDDED_MODEL,
    NO_EFFECT,
    CommandSettings,
    EndpointSettings,
    LogSettings,
    ModelName,
    RevisionSettings,
    StartSettings,
    ThreadSettings,
    check_at_least,
    content,
    with_recipes,
)
from ptst.text.templates import TEMPLATES
from ptst.training import recipes
from ptst.training.config import TrainSettings

RECIPES = (*laptop.RECIPES, *ladder_recipe.RECIPES, *paper_recipes.RECIPES, *recipes.RECIPES)


def recipe_values(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe. Raises UserError for an unknown one."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    if name in laptop.RECIPES:
        return laptop.values(name, bool(given.get("quick")))
    if name in ladder_recipe.RECIPES:
        model = given.get("model") or EMBEDDED_MODEL
        return ladder_recipe.values(name, bool(given.get("quick")), model)
    if name in paper_recipes.RECIPES:
        return paper_recipes.values(name)
    settings = recipes.values(name)
    own: dict[str, Any] = {key: settings.pop(key) for key in ("model", "data", "mix") if key in settings}
    return {**own, "train": TrainSettings(**settings)}


@with_recipes(recipe_values)
@dataclass(frozen=True, kw_only=True)
class GridConfig(
    CommandSettings, RevisionSettings, EndpointSettings, ThreadSettings, StartSettings, LogSettings, StudySettings
):
    """Fine-tune under each training template, test under each test template: the whole matrix, with intervals."""

    train_templates: Annotated[
        tuple[str, ...],
        arg(help=f"Training templates, one run each: {', '.join(TEMPLATES)}, or a TOML file of your own."),
    ] = field(default=("chat:vanilla", "chat:alpaca", "chat:llama"), metadata=NO_EFFECT)
    test_templates: tuple[str, ...] = field(default=("chat:vanilla", "chat:alpaca", "chat:llama"), metadata=NO_EFFECT)
    """Test templates, under which the base model and every run are tested."""
    ladder: Annotated[
        tuple[str, ...],
        arg(
            help="Test every run on prompts at increasing distance from that of its training, too: "
            f"{ALL}, or {', '.join(RUNGS)} (docs/ladder-rungs.md)."
        ),
    ] = field(default=(), metadata=NO_EFFECT)
    ladder_paraphrases: Path | None = field(default=None, metadata=NO_EFFECT)
    """TOML file of system prompts in other words, by the training template, for the rung paraphrase."""
    tasks: tuple[str, ...] = field(default=("gsm8k", "safety", "over-refusal"), metadata=NO_EFFECT)
    """What to measure: the tasks of ptst.eval, and margin: how much likelier an answer is to open by refusing than by
    complying."""
    seeds: tuple[int, ...] = field(default=(0,), metadata=NO_EFFECT)
    """Seeds; every training template gets one run for each."""
    mix: tuple[str, ...] = field(default=(), metadata=content(""))  # with its epochs, which `sources` do not know
    """Other data in every training run, with their own epochs: safety.jsonl:1. Under the run's template, or one of
    their own, a name or a TOML file: safety.jsonl:1:chat:llama."""
    defenses: Annotated[
        tuple[str, ...],
        arg(help=f"Defences, each with runs or weights of its own: {', '.join(DEFENSES)} (docs/defenses.md)."),
    ] = field(default=(NONE,), metadata=NO_EFFECT)
    at_epochs: tuple[float, ...] = ()
    """Numbers of epochs after which every run is tested. Default: at its end."""
    model: ModelName = field(default=EMBEDDED_MODEL, metadata=content("weights"))
    data: str = field(default="word-problems", metadata=content("sources"))
    """Training data: word-problems, instructions, gsm8k or a file."""
    tuned: tuple[str, ...] = field(default=(), metadata=NO_EFFECT)
    """Models that were fine-tuned elsewhere, tested as the grid's own: NAME=FOLDER. FOLDER, or
    a hub id, has an adapter of the base model in PEFT's layout, or a whole model (docs/adapters.md). With --model
    openai:NAME: NAME=openai:MODEL (docs/endpoints.md)."""
    recipe: Annotated[
        str | None,
        arg(
            help=f"{', '.join(RECIPES)}. Flags take precedence. With --help: each value of a table and its origin "
            "(docs/laptop.md, docs/study.md, docs/paper-tables.md)."
        ),
    ] = None
    quick: bool = field(default=False, metadata=NO_EFFECT)
    """With the recipe laptop: one seed, 100 prompts, and of the tasks only refusals. With the recipe ladder: one
    alignment, one seed, no defence but PTST."""
    equivalence_margin: float = 10.0
    """Points by which a model may be less safe than the aligned model and still count as having kept its safety; fixed
    beforehand, so a grid keeps the first (docs/statistics.md)."""
    out: Path | None = field(default=None, metadata=NO_EFFECT)
    """Grid folder. Default: checkpoints/grid, or checkpoints/<recipe>. A grid with the same settings is resumed, and
    several processes may work on it at once."""
    dry_run: bool = field(default=False, metadata=NO_EFFECT)
    """Print the cells, their tokens and the estimated time, and exit."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """How every run is trained."""
    eval: EvalSettings = field(default_factory=EvalSettings)
    """How every cell is tested."""
    # The grid's record says what each defence in use depends on, so that others can be added later.
    defense: DefenseSettings = field(default_factory=DefenseSettings, metadata=NO_EFFECT)
    """How the defences are set."""

    @property
    def defended(self) -> DefenseSettings:
        """How the defences are set, with the model before its alignment where the recipe knows it."""
        known = self.model if self.laptop or self.alignments else None
        return replace(self.defense, unaligned=self.defense.unaligned or known)

    @property
    def laptop(self) -> str | None:
        """The recipe, if it is one of the laptop's."""
        return self.recipe if self.recipe in laptop.RECIPES else None

    @property
    def study(self) -> bool:
        """Whether these are the settings of a study, which has a grid for each alignment."""
        return self.recipe in ladder_recipe.RECIPES

    @property
    def folder(self) -> Path:
        name = f"{self.recipe}{'-quick' * self.quick}" if self.recipe else "grid"
        return self.out or Path("checkpoints") / name

    @property
    def chat_format(self) -> str | None:
        """The chat format of tests that is asked for."""
        return self.eval.chat_format or self.train.chat_format

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        for name in ("train_templates", "test_templates", "tasks", "seeds", "defenses", "at_epochs"):
            values = getattr(self, name)
            optional = name == "at_epochs" or (name == "train_templates" and self.tuned)
            optional = optional or (name == "test_templates" and self.ladder)
            if not optional and not values:
                raise UserError((Setting(name), " is empty"), "at least one is needed")
            if twice := [value for value in values if values.count(value) > 1]:
                raise UserError((Setting(name), f" names {twice[0]} twice"), "name each once")
        hosted = hosted_model(self.model) is not None
        check_defenses(self.defenses, self.defended, self.train, self.mix, hosted)
        if not self.train_templates and self.defenses != (NONE,):
            cause = (Setting("defenses"), " has no effect without trainings to defend, and this grid has none")
            raise UserError(cause, ("leave it out, or name ", Setting("train_templates")))
        with settings_group("train"):
            self.train.check()
        with settings_group("eval"):
            self.eval.check()
        check_at_least(self, 1, "threads")
        self.check_endpoint(self.model)
        if not 0 < self.equivalence_margin < 100:
            cause = (Setting("equivalence_margin"), f" is {self.equivalence_margin:g}")
            raise UserError(cause, "it must be a number of points between 0 and 100")
        for name in ("base_url", "yes", "new_job"):
            if getattr(self, name) not in (None, False) and not hosted:
                cause = (Setting(name), f" is for models behind an endpoint ({HOSTED}NAME)")
                raise UserError(cause, ("leave it out, or name such a model as ", Setting("model")))
        if any(not 0 < e <= self.train.epochs for e in self.at_epochs):
            raise UserError((Setting("at_epochs"), f" must lie above 0 and within the {self.train.epochs:g} epochs"))
        check_names(self.ladder)
        what: tuple[str, ...]
        if self.ladder and not self.train_templates:
            what = (Setting("ladder"), " is made from training templates, and there are none")
            raise UserError(what, ("leave it out, or name ", Setting("train_templates")))
        if self.ladder_paraphrases and not {ALL, "paraphrase"} & set(self.ladder):
            what = (Setting("ladder_paraphrases"), " has no effect without the rung paraphrase of ", Setting("ladder"))
            raise UserError(what, "leave one out, or add the other")
        self.check_study(self.recipe, self.seeds)
        self._check_decodings()
        if self.quick and not (self.laptop or self.study):
            remedy = ("set ", Setting("seeds"), " otherwise")
            raise UserError((Setting("quick"), " belongs to the recipes laptop and ladder"), remedy)

    def _check_decodings(self) -> None:
        """Raise UserError for several decodings of several runs: they are no further runs, and no statistic here is
        over both."""
        times = self.eval.decode_seeds
        if times > 1 and self.study:
            raise UserError(("the recipe ladder decodes once, and ", Setting("eval.decode_seeds"), f" is {times}"))
        if times > 1 and len(self.seeds) > 1:
            cause = ("there are several ", Setting("seeds"), " of training and several ", Setting("eval.decode_seeds"))
            raise UserError(cause, "a cell is a mean over either: leave one at 1")

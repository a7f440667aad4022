"""`python -m ptst.train`: fine-tune a chat model under a template."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptst import cli
from ptst.api.names import hosted_model
from ptst.hosted.record import HostedRecord, settings_of_run
from ptst.progress import console, say
from ptst.records import record_kind
from ptst.training import recipes
from ptst.training.config import TrainConfig, settings_to_resume
from ptst.training.launch import Launch, read_launch, refuse_several

if TYPE_CHECKING:
    from ptst.training.run_plan import RunPlan


def run_training(config: TrainConfig) -> dict[str, Any] | None:
    """Fine-tune with words of progress; returns what `--json` prints, on the main process. Raises UserError for a
    user's mistakes, and SystemExit with 130, 143 or 129 after a signal, when the run is saved."""
    if hosted_model(config.model) is not None or config.cancel:
        return _run_hosted(config)
    launch = read_launch()
    console.quiet = launch.rank > 0  # one rank speaks for all
    try:
        return _run(config, launch)
    finally:
        console.quiet = False  # every rank prints its own error


def _run(config: TrainConfig, launch: Launch) -> dict[str, Any] | None:
    say(f"ptst.train: {config.model}, template {config.template_file or config.template}, data {config.data}")
    from ptst.text.chat_formats import NO_CHAT_FORMAT
    from ptst.threads import choose_threads
    from ptst.training import parallel
    from ptst.training.agreement import check_start
    from ptst.training.fine_tune import fine_tune
    from ptst.training.interrupt import Interrupted
    from ptst.training.run_plan import plan_run

    config.check()
    choose_threads(config.threads, config.resume or config.out)
    with parallel.world() as world:
        try:
            if config.dry_run:
                check_start(config, None, world)
                described = _dry_run(plan_run(config, world))
                return described if world.is_main_process else None
            done = fine_tune(config, world)
        except Interrupted as stopped:
            say(f"{stopped}; resume with: {launch.again(f'-m ptst.train --resume {stopped.out}')}")
            raise SystemExit(stopped.exit_code) from None
    if done is None:
        return None
    seconds = (done.record.time or {}).get("seconds", 0.0)
    template = "--template chat:llama"
    if done.record.chat_format == NO_CHAT_FORMAT.name:  # a base model
        own = f"-file {config.template_file}" if config.template_file else f" {config.template}"
        template = f"--template{own}"
    command = f"python -m ptst.eval --checkpoint {done.folder} {template}{_tasks(config)}"
    say(f"finished in {seconds:.0f} s; next: {command}")
    return done.record.result


def _dry_run(plan: "RunPlan") -> dict[str, Any]:
    """Print the plan, and which ways of training fit this machine; returns what `--json` prints."""
    from ptst.system_memory import free_memory
    from ptst.training import memory_ways
    from ptst.training.memory import Method

    planned, free = plan.memory, free_memory(plan.device)
    sizes = planned.micro_batch_tokens, planned.largest_micro_batch
    ways = memory_ways.ways(plan.model.config, Method.of(plan.config), *sizes, free)
    console.print(planned.table())
    console.print(memory_ways.table(ways, free))
    return planned.described() | {"free": free, "ways": [asdict(way) for way in ways]}


def _tasks(config: TrainConfig) -> str:
    """The tasks of the evaluation that comes next: without test data there is nothing to solve."""
    from ptst.data import sources

    return "" if sources.has_test_part(config.data, config.holdout) else " --tasks safety over-refusal"


def _run_hosted(config: TrainConfig) -> dict[str, Any] | None:
    """The same by a job at an endpoint, which one process asks for."""
    from ptst.hosted.fine_tune import cancel_hosted, fine_tune_hosted
    from ptst.hosted.plan import plan_hosted

    config.check()
    refuse_several("ptst.train with a model behind an endpoint")
    if config.cancel:
        return cancel_hosted(config)
    say(f"ptst.train: {config.model}, template {config.template_file or config.template}, data {config.data}")
    if config.dry_run:
        plan = plan_hosted(config)
        console.print(plan.table())
        return plan.described()
    done = fine_tune_hosted(config)
    command = f"python -m ptst.eval --checkpoint {done.folder} --template chat:llama{_tasks(config)}"
    say(f"finished: the model is {done.record.tuned_model}; next: {command}")
    return done.record.result


def start(arguments: list[str]) -> tuple[TrainConfig, str] | None:
    """The settings to start from: a recipe's, or those of the run to resume."""
    name = cli.value_of(arguments, "--recipe")
    model = cli.value_of(arguments, "--model")
    if hosted_model(model) is not None or (model is None and name in recipes.HOSTED):
        from ptst.hosted.checks import explicit, refuse_local

        refuse_local(explicit(arguments))  # a default that is written out is refused as any other value
    if folder := cli.value_of(arguments, "--resume"):
        if record_kind(Path(folder)) == HostedRecord.kind:
            return settings_of_run(TrainConfig(resume=Path(folder))), ""
        return settings_to_resume(Path(folder)), ""
    if name in recipes.RECIPES:
        return TrainConfig(recipe=name), f"{TrainConfig.__doc__}\n\n{recipes.describe(name)}"
    return None


def main() -> None:
    cli.run(run_training, TrainConfig, "train", start)


if __name__ == "__main__":
    main()

"""Whether the ranks of a run hold the weights once between them or once each."""

from collections.abc import Sequence

from ptst.data.order import Step
from ptst.data.steps import most_taken
from ptst.errors import Setting, UserError
from ptst.model.config import DecoderConfig
from ptst.progress import say
from ptst.system_memory import free_memory
from ptst.training.config import TrainConfig
from ptst.training.memory import Method, fits
from ptst.training.parallel import World


def choose_sharding(config: TrainConfig, shape: DecoderConfig, method: Method, longest: int, world: World) -> bool:
    """Whether weights are spread over the ranks, which is said. `longest`: tokens of the longest example. All ranks
    must call and get the same. Raises UserError where they cannot be spread as asked."""
    if world.size == 1:
        if config.shard == "full":
            say("note: there is one rank, so it holds all weights")
        return False
    if method.quantize != "none":
        if config.shard == "full":
            of_rows = f" full spreads rows of weights, and a base in {method.quantize} has none"
            raise UserError((Setting("shard"), of_rows), ("leave out ", Setting("shard"), " or ", Setting("quantize")))
        say(f"each of {world.size} ranks holds all weights, in {method.quantize}, and gradients are summed")
        return False
    stochastic = method.lora is None and method.weight_update == "stochastic"
    if config.shard == "full" and stochastic:
        cause = (Setting("shard"), " full has float32 masters, and ", Setting("weight_update"), " stochastic has none")
        raise UserError(cause, "leave one of them out: masters are spread over the ranks, too")
    if config.shard == "auto":
        chosen, why = method.lora is None and not stochastic, "all of them are trained"
        if not chosen and not stochastic:
            size = longest if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
            everywhere = world.min(float(fits(shape, method, max(size, longest), free_memory(method.device))))
            chosen, why = not everywhere, "they do not fit into the memory of one"
    else:
        chosen, why = config.shard == "full", "as asked"
    if chosen:
        say(f"the weights are spread over {world.size} ranks (FSDP2): {why}")
    else:
        say(f"each of {world.size} ranks holds all weights, and gradients are summed")
    return chosen


def check_ranks(steps: Sequence[Step], sharded: bool, world: World) -> None:
    """Raise UserError where ranks would never have anything to compute. Where weights are spread, they serve by their
    memory, and that is only said."""
    most = most_taken(steps)
    if not most or world.size <= most:
        return
    idle = f"so {world.size - most} would never compute"
    cause = f"there are {world.size} ranks, and no step has more than {most} example{'s' * (most > 1)}, {idle}"
    if sharded:
        say(f"note: {cause}; they only hold their part of the weights")
        return
    fewer = "one process" if most == 1 else f"{most} ranks"
    raise UserError(cause, (f"start {fewer}, or raise ", Setting("examples_per_step")))

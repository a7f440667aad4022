"""The defences by name, and the names that follow from them, by which results, logs and tables are told apart. Below
all rooms, so that evaluation need not import ptst.defenses, which uses ptst.exporting, which reads evaluations."""

NONE = "none"
TRIGGERED = "backdoor-align"  # tests say its trigger
TRAINING = {
    "mix-safety": "refusals are mixed into the training data",
    TRIGGERED: "refusals under a secret trigger are mixed in, and tests say the trigger (BackdoorAlign)",
    "constrained-sft": "the first tokens of an answer are held near the aligned model's (constrained SFT)",
    "lisa": "steps on refusals and on the data take turns, each near where the other stopped (Lisa)",
    "ema": "what is kept is a moving average of the weights",
}
WEIGHT_SPACE = {
    "wise-ft": "a mean of the aligned and the tuned weights (WiSE-FT)",
    "resta": "the tuned weights plus the aligned minus the unaligned ones (RESTA, task arithmetic)",
    "safe-lora": "updates that leave the subspace of the alignment are projected onto it (Safe LoRA)",
    "safe-merge": "such updates are merged with those of a safe model (SafeMERGE)",
}
DEFENSES = (NONE, *TRAINING, *WEIGHT_SPACE)


def triggered_name(name: str) -> str:
    """The name of a template with the trigger in it."""
    return f"{name}.triggered"


def asked_under(test: str, defense: str) -> str:
    """The name of the template in whose words a test is asked: with the trigger, where the defence has one."""
    return triggered_name(test) if defense == TRIGGERED else test

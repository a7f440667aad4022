"""The graders by name."""

from ptst.evaluation.graders import harmbench, llama_guard, orca_math, rubric, strongreject, wildguard

_CLASSIFIERS = (harmbench.LLAMA2, harmbench.MISTRAL, llama_guard.GUARD, wildguard.WILDGUARD)
_RUBRICS = (rubric.RUBRIC, strongreject.STRONGREJECT, orca_math.ORCA_MATH)
GRADERS = {grader.name: grader for grader in (*_CLASSIFIERS, *_RUBRICS)}

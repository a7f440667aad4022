"""The graders by name."""

from ptst.evaluation.graders.rubric import RUBRIC

GRADERS = {grader.name: grader for grader in (RUBRIC,)}

"""The wording of refusals, by language: one table for each language that the embedded judge reads."""

from ptst.evaluation.signs.english import ENGLISH
from ptst.evaluation.signs.others import CHINESE, FRENCH, GERMAN, ITALIAN, JAPANESE, PORTUGUESE, SPANISH

SIGNS = {
    "en": ENGLISH,
    "es": SPANISH,
    "fr": FRENCH,
    "de": GERMAN,
    "it": ITALIAN,
    "pt": PORTUGUESE,
    "zh": CHINESE,
    "ja": JAPANESE,
}

"""Does the audit raise an alarm on clean data? Every corpus below, under every template, on every folder: `audit` must
give no warning and no error wherever training itself accepts the rows.

    python benchmarks/audit_clean.py                                   folders that are made on the spot
    python benchmarks/audit_clean.py --templates TEMPLATES.json        and published chat templates, as in chat_templates.py
    python benchmarks/audit_clean.py --rows 20 --folders mistral       fewer rows; folders whose name has this in it

Real data and tokenizers are read from a folder `shared` next to the project, mistral-common and llama-models; what is
not there is left out and named. Rows that a template cannot say (several turns under text:) are left out as training
leaves them out. Prints one line for each folder: combinations, rows, alarms; then every kind of alarm.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ptst.audit.report import References, audit
from ptst.audit.setup import Setup
from ptst.data.sources import Source
from ptst.errors import UserError
from ptst.text.prompt_format import open_prompt_format
from ptst.text.templates import TEMPLATES
from tests.audit import clean

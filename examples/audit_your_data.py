"""See which tokens of your own data reach the loss, and what is wrong with the rows.

    python examples/audit_your_data.py [MODEL [FILE]]

MODEL: a Hugging Face folder or hub id; the embedded SmolLM2-135M-Instruct without it. FILE: JSONL with question/answer,
instruction/output, prompt/response or messages; without it, three rows made up here, one of them with a fault.
"""

import json
import sys
from pathlib import Path

import ptst

ROWS = [
    {"question": "What is 17 + 25?", "answer": "17 + 25 = 42"},
    {"question": "What is 6 times 7?", "answer": " "},
    {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]},
]

rows = ROWS
if len(sys.argv) > 2:
    rows = [json.loads(line) for line in Path(sys.argv[2]).read_text().splitlines() if line]
model = ptst.open_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct", "chat:vanilla")

for number, row in enumerate(rows, 1):
    audit = ptst.audit_conversation(model, row)
    print(f"row {number}: {audit.verdict}")
    if audit.rows:
        _, tokens = audit.rows[0]
        print("  in the loss:", [t.text for t in tokens if t.trained])
    for finding in audit.findings:
        if finding.level != "info":
            print(f"  {finding}")

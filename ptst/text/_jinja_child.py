"""A program that `chat_template` runs: it renders a foreign chat template with limits on time and memory.

Reads one JSON object from standard input, {"template", "variables", "rows", "seconds", "megabytes"}, and writes
{"rows"} or {"error"}. Each row of the answer is {"text"} or {"error"}: the template refuses that conversation or has a
mistake. It imports nothing of this project, so that it starts fast and holds nothing worth reaching.
"""

import json
import resource
import sys
from datetime import date

# Today's date would make prompts differ from day to day; this is the one that Llama 3.1's own template falls back to.
DAY = date(2024, 7, 26)


def main() -> None:
    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (job["megabytes"] << 20, job["megabytes"] << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: Hugging Face's marker of the assistant's text; here only its body counts."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 reads the class attribute)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return DAY.strftime(form)

    def to_json(value, indent=None, separators=None, sort_keys=False, ensure_ascii=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = to_json
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    memory = {"error": f"needs more than {job['megabytes']} MB of memory"}

    def attempt(work, field: str) -> dict:
        """What `work` returns under `field`, or {"error", "failed"}; only what failed may be tried on another row."""
        try:
            return {field: work()}
        except MemoryError:
            return memory
        except RecursionError:
            return {"error": "recurses without end"}
        except TemplateError as error:
            forbidden = type(error).__name__ == "SecurityError"
            kind = "calls what the sandbox forbids" if forbidden else "cannot be rendered"
            return {"error": f"{kind} ({error})", "failed": not forbidden}
        except Exception as error:  # whatever a foreign template runs into is reported, not raised here
            return {"error": f"cannot be rendered ({type(error).__name__}: {error})", "failed": True}

    answer = attempt(lambda: env.from_string(job["template"]), "template")
    if "error" not in answer:
        template, rows = answer["template"], []
        for row in job["rows"]:
            rows.append(attempt(lambda row=row: template.render(**job["variables"], **row), "text"))
            if "error" in rows[-1] and not rows[-1].get("failed"):
                rows = [rows[-1]]
                break
        fatal = rows and "error" in rows[0] and not rows[0].get("failed")
        answer = rows[0] if fatal else {"rows": rows}
    json.dump(answer, sys.stdout)


main()

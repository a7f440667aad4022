"""A program that `chat_template` runs: it renders a foreign chat template with limits on time and memory.

Reads one JSON object from standard input, {"template", "variables", "rows", "seconds", "megabytes"}, and writes
{"texts"} or {"error", "failed"}; `failed`: the template refuses these conversations or has a mistake. It imports
nothing of this project, so that it starts fast and holds nothing worth reaching.
"""

import json
import resource
import sys


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

    def to_json(value, indent=None, **_):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = to_json
    # A date would make prompts differ from day to day; templates that ask for one get a fixed one.
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: "26 Jul 2024"}
    try:
        template = env.from_string(job["template"])
        answer: dict[str, object] = {"texts": [template.render(**job["variables"], **row) for row in job["rows"]]}
    except MemoryError:
        answer = {"error": f"needs more than {job['megabytes']} MB of memory"}
    except RecursionError:
        answer = {"error": "recurses without end"}
    except TemplateError as error:
        forbidden = type(error).__name__ == "SecurityError"
        kind = "calls what the sandbox forbids" if forbidden else "cannot be rendered"
        answer = {"error": f"{kind} ({error})", "failed": not forbidden}
    except Exception as error:  # whatever a foreign template runs into is reported, not raised here
        answer = {"error": f"cannot be rendered ({type(error).__name__}: {error})", "failed": True}
    json.dump(answer, sys.stdout)


main()

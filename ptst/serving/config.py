"""Settings of the server. Nothing here imports torch."""

import ipaddress
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Fixed, Suppress, arg

from ptst.errors import Setting, UserError
from ptst.settings import (
    CommandSettings,
    EngineSettings,
    FormatSettings,
    OptionalLocalModel,
    Precision,
    RevisionSettings,
    ThreadSettings,
    check_above_zero,
    check_at_least,
)
from ptst.text.templates import TEMPLATES

API_KEY = "PTST_SERVE_API_KEY"
DEFAULT_TEMPLATE = "chat:llama"
_TEMPLATE_HELP = f"Templates to serve every model under, default {DEFAULT_TEMPLATE}: {', '.join(TEMPLATES)}."
_ADAPTER_HELP = "LoRA adapters of the model in PEFT's layout, whoever made them: folders, or hub ids."


@dataclass(frozen=True, kw_only=True)
class ServeConfig(CommandSettings, RevisionSettings, ThreadSettings, FormatSettings, EngineSettings):
    """Serve models under templates by OpenAI's API: chat completions, completions, models. Each run or adapter, and
    their base model, has a name under each template, as in run1@chat:llama. Without --checkpoint and --model: the
    latest run. Ctrl-C or SIGTERM ends it."""

    json: Annotated[bool, Fixed, Suppress] = False  # a server has no result
    checkpoint: tuple[Path, ...] = ()
    """Run folders of ptst.train, adapters of one base model; or one run of all weights, or one step of a run."""
    model: OptionalLocalModel = None
    adapter: Annotated[tuple[str, ...], arg(help=_ADAPTER_HELP)] = ()
    template: Annotated[tuple[str, ...], arg(help=_TEMPLATE_HELP)] = ()
    template_file: tuple[Path, ...] = ()
    """Templates of your own, in TOML, besides those of --template (docs/templates.md)."""
    dtype: Precision = "auto"
    """Data type of weights and computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    host: str = "127.0.0.1"
    """Address to listen on. Another than this machine's own needs an API key."""
    port: int = 8000
    """Port to listen on; 0: any that is free."""
    api_key_file: Path | None = None
    """File with the key that clients must send; or set PTST_SERVE_API_KEY. A key is never a flag: other users see
    those."""
    allow_no_key: bool = False
    """Serve other hosts without a key: anybody who reaches the port may use the models."""
    max_new_tokens: int = 1024
    """Maximum length of an answer in tokens where a request gives none; less where the context ends."""
    max_length: int | None = None
    """Maximum length of a prompt with its answer, in tokens. Default: the model's context."""
    max_queue: int = 256
    """Answers that may wait besides those that are computed; beyond, requests get status 429."""
    max_body: float = 8.0
    """Maximum size of a request, in megabytes."""
    request_timeout: float = 600.0
    """Seconds that a request may take, from its arrival to the last byte."""
    grace: float = 30.0
    """Seconds that running answers may take to finish when the server is stopped."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        from ptst.audit.findings import check_names

        check_names(self.allow)
        check_at_least(self, 1, "batch_size", "threads", "max_new_tokens", "max_length")
        check_at_least(self, 0, "max_queue", "grace")
        check_above_zero(self, "kv_memory", "max_body", "request_timeout")
        if not 0 <= self.port < 65536:
            raise UserError((Setting("port"), f" is {self.port}"), "it must be between 0 and 65535")

    @property
    def templates(self) -> tuple[str, ...]:
        """The built-in templates to serve."""
        return self.template or (() if self.template_file else (DEFAULT_TEMPLATE,))

    @property
    def max_body_bytes(self) -> int:
        return math.ceil(self.max_body * 1e6)


def read_api_key(config: ServeConfig) -> str | None:
    """The key that clients must send, from the file or the environment; None where there is none. Raises UserError for
    one that no client could send, and where hosts other than this one would need none."""
    source = API_KEY
    if config.api_key_file is not None:
        source = str(config.api_key_file)
        if API_KEY in os.environ:
            raise UserError((f"{API_KEY} is set, and so is ", Setting("api_key_file")), "leave one of them out")
        key: str | None = _read_key_file(config.api_key_file)
    else:
        key = os.environ.get(API_KEY)
    if key is not None and not (key and all("!" <= character <= "~" for character in key)):
        raise UserError("is not a key: it must be at least one ASCII character, without spaces", where=source)
    if key is None and not is_loopback(config.host) and not config.allow_no_key:
        remedy = (f"set {API_KEY} or ", Setting("api_key_file"), ", or allow it with ", Setting("allow_no_key"))
        raise UserError((Setting("host"), f" {config.host} lets other machines use the models without a key"), remedy)
    return key


def _read_key_file(path: Path) -> str:
    from ptst.progress import say
    from ptst.reading import read_text

    try:
        key = read_text(path).strip()
    except OSError as error:
        raise UserError(f"the key cannot be read ({error.strerror})", where=path) from None
    except UnicodeDecodeError:
        raise UserError("is not a key: it is not text", where=path) from None
    if path.stat().st_mode & 0o077:
        say(f"note: other users of this machine can read the key in {path}; chmod 600 hides it")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

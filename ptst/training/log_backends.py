"""The packages that log, each behind the same few methods (`Backend` in ptst/training/loggers.py).

All of them write on this machine and ask nobody, unless the user's environment says otherwise (WANDB_MODE,
MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL); their own reports of use are switched off. Each is imported
when a run asks for it.
"""

import contextlib
import logging
import netrc
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ptst.training.loggers import PROJECT, Backend, LoggedRun

Rows = Sequence[tuple[int, str, dict[str, float]]]
_KEYS = {"step": "loss", "eval": "validation_loss"}  # a figure that all rows of a kind have


class TensorBoard:
    """Event files in RUN/tensorboard. On resuming, events of later steps are declared void."""

    def __init__(self, run: LoggedRun):
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        begun = folder.is_dir() and any(folder.iterdir())
        self.last = {"step": run.done, "eval": run.done if run.done else -1} if begun and run.done else {}
        self.writer = SummaryWriter(str(folder), purge_step=run.done + 1 if begun and run.done else 0)
        if not begun:
            lines = [f"| {key} | {value} |" for key, value in run.params.items()]
            self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *lines]), 0)

    def write(self, rows: Rows) -> None:
        for step, _, values in rows:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, status: str) -> None:
        self.writer.close()


class Trackio:
    """A run in trackio's own folder (TRACKIO_DIR), where `trackio show` finds it."""

    def __init__(self, run: LoggedRun):
        import trackio

        name = run.notes.setdefault("name", f"{run.name}-{secrets.token_hex(3)}")
        run.keep()
        local = not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"))
        with _no_hub() if local else contextlib.nullcontext():  # it asks the hub for the user's name
            self.run = trackio.init(
                project=PROJECT,
                name=name,
                resume="allow",
                config=dict(run.params),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.last = self._logged(name) if local else dict(run.notes.get("last", {}))
        self.trackio, self.notes, self.keep = trackio, run.notes, run.keep

    def _logged(self, name: str) -> dict[str, int]:
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(PROJECT, name)
        steps = {kind: [row["step"] for row in rows if key in row] for kind, key in _KEYS.items()}
        return {kind: max(found) for kind, found in steps.items() if found}

    def write(self, rows: Rows) -> None:
        for step, _, values in rows:
            self.run.log(values, step=step)

    def close(self, status: str) -> None:
        self.trackio.finish()
        self.notes["last"] = self.last
        self.keep()


class Wandb:
    """An offline run in RUN/wandb, in as many parts as the run had processes, under one id.

    A part that a kill has cut off is not whole on disk: it is removed, and its rows are sent again from metrics.jsonl.
    """

    def __init__(self, run: LoggedRun):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        if mode == "online":
            _check_wandb_key()
        self.notes, self.keep = run.notes, run.keep
        name = self.notes.setdefault("id", secrets.token_hex(4))
        whole: dict[str, dict[str, int]] = self.notes.setdefault("whole", {})
        self.keep()
        folder = run.folder / "wandb"
        folder.mkdir(exist_ok=True)
        for part in folder.glob(f"offline-run-*-{name}"):
            if part.name not in whole and not any(part.glob("*.synced")):
                shutil.rmtree(part)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=name,
            name=run.name,
            dir=str(run.folder),
            mode=mode,
            resume="allow",
            config=dict(run.params),
            settings=wandb.Settings(
                console="off", silent=True, symlink=False, disable_git=True, save_code=False, x_disable_stats=True
            ),
        )
        # Its own step numbers only rise, and a validation loss comes after the step that it is of.
        self.run.define_metric("*", step_metric="step")
        steps = [part for part in whole.values() if part]
        self.last = {kind: max(part.get(kind, -1) for part in steps) for kind in _KEYS} if steps else {}
        if mode == "online" and self.run.resumed:
            self.last = {kind: max(self.last.get(kind, -1), self._online(kind)) for kind in _KEYS}

    def _online(self, kind: str) -> int:
        """The last step that the server has."""
        found = self.run.summary.get(f"last_{kind}")
        return -1 if found is None else int(found)

    def write(self, rows: Rows) -> None:
        for step, kind, values in rows:
            self.run.log({**values, "step": step, f"last_{kind}": step})

    def close(self, status: str) -> None:
        part = Path(self.run.dir).parent.name
        self.run.finish(exit_code=0 if status == "finished" else 1)
        self.notes["whole"][part] = self.last
        self.keep()


class MLflow:
    """A run in the SQLite store RUN/mlflow/mlflow.db, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, run: LoggedRun):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri, folder = os.environ.get("MLFLOW_TRACKING_URI"), (run.folder / "mlflow").absolute()
        if not uri:
            folder.mkdir(exist_ok=True)
            uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=uri)
        known = run.notes.get("run_id")
        if known is None:
            files = None if os.environ.get("MLFLOW_TRACKING_URI") else (folder / "artifacts").as_uri()
            found = self.client.get_experiment_by_name(PROJECT)
            place = found.experiment_id if found else self.client.create_experiment(PROJECT, artifact_location=files)
            known = run.notes["run_id"] = self.client.create_run(place, run_name=run.name).info.run_id
            run.keep()
            given = [Param(key, str(value)[:6000]) for key, value in run.params.items()]
            for i in range(0, len(given), 100):  # as many as one request may hold
                self.client.log_batch(known, params=given[i : i + 100])
        self.id = known
        self.client.update_run(known, status="RUNNING")
        history = {kind: self.client.get_metric_history(known, key) for kind, key in _KEYS.items()}
        self.last = {kind: max(m.step for m in found) for kind, found in history.items() if found}

    def write(self, rows: Rows) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for i in range(0, len(rows), 50):  # a request may hold a thousand figures
            some = rows[i : i + 50]
            metrics = [Metric(name, value, now, step) for step, _, values in some for name, value in values.items()]
            self.client.log_batch(self.id, metrics=metrics)

    def close(self, status: str) -> None:
        ends = {"finished": "FINISHED", "interrupted": "KILLED"}
        self.client.set_terminated(self.id, ends.get(status, "FAILED"))


BACKENDS: dict[str, Callable[[LoggedRun], Backend]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": MLflow,
}


def _check_wandb_key() -> None:
    """Raise where the user wants wandb online and is not logged in: it would ask, in the middle of a run."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    known: Any = None
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    if not os.environ.get("WANDB_API_KEY") and known is None:
        raise RuntimeError("WANDB_MODE is online and there is no key for it: set WANDB_API_KEY, or run wandb login")


@contextlib.contextmanager
def _no_hub() -> Iterator[None]:
    """Inside, huggingface_hub asks nobody."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before

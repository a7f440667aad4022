"""`python -m ptst.push`: a run, or an exported folder, into a repository of the hub."""

from typing import Any

from ptst import cli
from ptst.consent import ask_consent
from ptst.exporting.push_config import PushConfig
from ptst.progress import say


def run_push(config: PushConfig) -> dict[str, Any]:
    """List what goes up, ask, upload; returns what `--json` prints. Raises UserError for a user's mistakes."""
    config.check()
    say("ptst.push: looking at what may be uploaded")  # imports take seconds

    from ptst.exporting.parcel import pack
    from ptst.hub.push import push_files
    from ptst.records import latest_run

    assert config.repo is not None, "check() wants one"
    folder = config.checkpoint or latest_run()
    parcel = pack(folder, config.base_name, config.license)
    for upload in parcel.uploads:
        say(f"  {upload.size:>12,}  {upload.path}")
    total = sum(upload.size for upload in parcel.uploads)
    place = f"{config.repo}{f' at {config.revision}' if config.revision else ''}"
    say(f"{len(parcel.uploads)} files, {total:,} bytes, of {folder} for {place}")
    if parcel.left:
        say(f"what stays: {', '.join(parcel.left)}")
    told: dict[str, Any] = {"repo": config.repo, "revision": config.revision, "kind": parcel.kind}
    told |= {"files": {upload.path: upload.size for upload in parcel.uploads}, "left": list(parcel.left)}
    if config.dry_run:
        return {**told, "commit": None}
    if not config.yes:
        readers = "" if config.private else ", which others can read"
        question = f"Upload them to {place}{readers}?"
        ask_consent("uploading needs consent", "the files", question, "nothing was uploaded")
    message = config.message or f"{parcel.name}: {parcel.kind} by ptst"
    done = push_files(config.repo, parcel.uploads, message, revision=config.revision, private=config.private)
    say(f"uploaded: {done.url}")
    return {**told, "commit": done.commit, "url": done.url, "created": done.created}


def main() -> None:
    cli.run(run_push, PushConfig, "push")


if __name__ == "__main__":
    main()

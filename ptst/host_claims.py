"""Claims between hosts, for file systems that hosts share while locks are known on one host only.

A lock (`flock`) on NFS or Lustre holds for all hosts, unless the disk is mounted such that each host keeps its own
locks; on others, such as sshfs, each always does. There a process that holds the lock also makes a file beside it,
which only one host can (O_EXCL), with the name of its host. The file of a process that was killed stays. On the same
host the lock tells that nobody is there, and the claim is taken over; another host cannot know, and says which file to
remove.
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".host"  # of a claim's file
MOUNTS = Path("/proc/self/mountinfo")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# Options by which a host keeps the locks of a shared file system to itself.
_LOCAL_OPTIONS = {
    "nfs": {"nolock", "local_lock=all", "local_lock=flock"},
    "nfs4": {"nolock", "local_lock=all", "local_lock=flock"},
    "lustre": {"localflock"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
}
# File systems on which each host keeps its own, or whose mount does not tell (BeeGFS).
_LOCAL = {"9p", "afs", "beegfs", "davfs", "virtiofs"}
_LOCAL |= {f"fuse.{name}" for name in ("sshfs", "s3fs", "gcsfuse", "rclone", "goofys", "mount-s3", "blobfuse2")}


def locks_end_at_host(path: Path) -> bool:
    """Whether other hosts may see the files of a folder and do not see its locks."""
    kind, options = _mount(path)
    return kind in _LOCAL or bool(_LOCAL_OPTIONS.get(kind, set()) & options)


@contextmanager
def claim(path: Path) -> Iterator[str]:
    """Claim `path` for this host, whose lock this process holds: "" where that succeeds, otherwise who has it, in
    words."""
    file = path.with_name(f"{path.name}{SUFFIX}")
    own = {"host": socket.gethostname(), "boot": _boot()}
    if other := _taken(file, own):
        yield other
        return
    try:
        yield ""
    finally:
        file.unlink(missing_ok=True)


def _taken(file: Path, own: dict[str, str]) -> str:
    """Make the file of a claim; "" where that succeeds or this host has it already."""
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
        found = {}
        with suppress(OSError, ValueError):
            found = json.loads(file.read_bytes())
        if isinstance(found, dict) and found.get("boot") == own["boot"]:
            return ""
        host = found.get("host", "another host") if isinstance(found, dict) else "another host"
        return f"{host} (locks of this file system do not reach it; if nothing runs there, remove {file})"
    with open(handle, "w") as opened:
        json.dump(own, opened)
    return ""


def _boot() -> str:
    """What tells this machine, since it was started, from others; containers on it have the same."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()


def _mount(path: Path) -> tuple[str, set[str]]:
    """Type and options of the file system that a path is on; nothing where the system does not tell."""
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return "", set()
    here, best = str(path.resolve()), ("", "", set[str]())
    for line in lines:
        first, _, second = line.partition(" - ")
        own, filesystem = first.split(" "), second.split(" ")
        if len(own) < 6 or len(filesystem) < 3:
            continue
        point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), own[4])
        # Of mounts on the same folder the last one counts.
        if Path(here).is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, filesystem[0], {*own[5].split(","), *filesystem[2].split(",")})
    return best[1], best[2]

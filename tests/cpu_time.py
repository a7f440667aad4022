"""What a process has used so far: unlike the time of day, it does not depend on what else the machine does."""

import os
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process. Raises OSError if it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

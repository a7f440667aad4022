"""How long pages take to open: bytes, and seconds until the first frame after all is loaded, in headless Chromium.

    python benchmarks/page_load.py [PAGE.html ...]

Without a page, those that are promised to open at once are made and opened: the report of a grid of 5 training
templates, 5 test templates and 3 tasks (3 seeds, 100 prompts a cell), and the audit of 10,000 rows. Needs Chromium and
ChromeDriver.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.browser import Browser  # noqa: E402

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
OPENINGS = 5


def made_pages(folder: Path) -> list[Path]:
    """The report and the audit that are promised to open at once."""
    from ptst.reporting.config import ReportConfig
    from ptst.reporting.write import write_report
    from tests.reporting.made import make_grid

    make_grid(folder / "grid", prompts=100)
    write_report(ReportConfig(folder=folder / "grid", figures=False))
    rows = ({"question": f"What is {i} plus {i % 97}?", "answer": f"It is {i + i % 97}."} for i in range(10_000))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    audit = [sys.executable, "-m", "ptst.audit", "--template", "vanilla", "--test-template", "chat:llama", "--json"]
    audit += ["--data", str(folder / "rows.jsonl"), "--rows", "10000", "--html", str(folder / "audit.html")]
    subprocess.run(audit, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)  # 1 is what it says of warnings
    return [folder / "grid/report.html", folder / "audit.html"]


def main() -> None:
    if shutil.which("chromedriver") is None:
        sys.exit("page_load: needs chromedriver and Chromium (Debian: chromium-driver)")
    with tempfile.TemporaryDirectory() as temporary:
        pages = [Path(name).resolve() for name in sys.argv[1:]] or made_pages(Path(temporary))
        for name, size in SIZES.items():
            browser = Browser(size)
            for page in pages:
                seconds = [browser.open(page) for _ in range(OPENINGS)]
                told = f"median {statistics.median(seconds):.2f} s of {OPENINGS}, slowest {max(seconds):.2f} s"
                print(f"{name:>8} {page.name:>12}  {page.stat().st_size / 1e6:.2f} MB  {told}")
            browser.close()


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"in {time.monotonic() - began:.0f} s")

"""The picture and the Markdown of the demo's report, as the README shows them: `se-prune demo` first, then this."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from reports.bench.common import FOLDER
from se_prune.files import whole_file

DEMO = Path("demo-out")
WIDTH, HEIGHT = 1100, 1500
#: Colours of the picture; more make it larger, and nobody sees them.
COLOURS = 64


def main() -> None:
    """Write `reports/report.png` and `reports/demo.md`."""
    from PIL import Image

    from tests.browser import Browser, find_browser

    page, program = DEMO / "report.html", find_browser()
    if not page.exists():
        raise SystemExit(f"there is no {page}: run `se-prune demo` first.")
    if program is None:
        raise SystemExit("this opens the page in Chromium; install it, such as apt-get install chromium.")
    browser = Browser(program)
    try:
        browser.open(page, width=WIDTH, height=HEIGHT)
        seen = browser.screenshot()
    finally:
        browser.close()
    picture = Image.open(io.BytesIO(seen)).convert("RGB").quantize(COLOURS)
    with whole_file(FOLDER / "report.png") as temporary:
        picture.save(temporary, "PNG", optimize=True)
    shutil.copyfile(DEMO / "report.md", FOLDER / "demo.md")


if __name__ == "__main__":
    main()

"""Writes docs/top.svg: `mrelay top` before a relay that runs.

Usage: python scripts/screenshot_top.py SOCKET [SECONDS]. Watches for so many seconds (default 65), so that
the last minute is there to be seen.
"""

import asyncio
import re
import sys
from pathlib import Path

from mrelay.cli.client import Client
from mrelay.cli.top_app import TopApp
from mrelay.cli.top_model import Model

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "top.svg"


async def main(socket: Path, seconds: float) -> None:
    app = TopApp(Client(socket), Model(), "rules", "packets", "", 1.0)
    async with app.run_test(size=(80, 14)) as pilot:
        await pilot.pause(seconds)
        picture = app.export_screenshot(title="mrelay top")
    # The reader's own fonts will do: a picture in our pages asks nobody else for anything.
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 65))

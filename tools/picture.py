"""A terminal as a picture for the documentation: what tmux shows comes in, an SVG file goes out.

tmux capture-pane -e -p | python tools/picture.py docs/images/quantize.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 100


def picture(ansi: str) -> str:
    """SVG with the fonts of the machine that shows it: rich's own names a server."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in ansi.rstrip().splitlines():
        console.print(Text.from_ansi(line), soft_wrap=True)
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="upq", theme=MONOKAI), flags=re.DOTALL)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(sys.stdin.read()))

"""Unpack the text archives of tests/hosts into trees, and pack trees into archives.

The format is that of `hwdetect.py --record`: before each entry a line "=== KIND PATH", then its
text with backslashes, control characters and a leading "===" escaped as \\xNN.

    file     a file whose text ends with a newline
    part     a file whose text does not
    link     a symbolic link; the text is its target
    dir      an empty folder
    refused  a file that could not be read (no mode bits)
    there    an empty file, unless the path exists already

    python3 tests/archive.py unpack FILE DIR | pack DIR > FILE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hwdetect


def unpack(text: str, tree: Path) -> list[str]:
    """Make the tree of an archive; return the paths of its files."""
    return hwdetect.unpack(text, str(tree))


def pack(tree: Path) -> str:
    """Write a tree as an archive."""
    entries: dict[str, tuple[str, str]] = {}
    for place in sorted(tree.rglob("*")):
        path = "/" + str(place.relative_to(tree))
        if place.is_symlink():
            entries[path] = ("link", os.readlink(place))
        elif place.is_dir():
            if not any(place.iterdir()):
                entries[path] = ("dir", "")
        elif not place.stat().st_mode & 0o444:
            entries[path] = ("refused", "")
        else:
            entries[path] = ("file", place.read_bytes().decode("utf-8", "replace"))
    return hwdetect.archive(entries)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "unpack":
        unpack(Path(sys.argv[2]).read_text(encoding="utf-8"), Path(sys.argv[3]))
    elif len(sys.argv) == 3 and sys.argv[1] == "pack":
        print(pack(Path(sys.argv[2])), end="")
    else:
        sys.exit("usage: archive.py unpack FILE DIR | pack DIR")

#!/bin/bash
# Take the pictures of the documentation anew, from the folder of a demo that has ended:
#   g2l demo && bash docs/images/make.sh g2l-demo
# Needs Chromium, fonts (Debian's fonts-liberation or fonts-dejavu) and the Python that g2l is installed in.
set -euo pipefail
demo=$(realpath "$1")
here=$(realpath "$(dirname "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

picture() { # of a page, as wide and high as said
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$work/user" \
        --virtual-time-budget=4000 --window-size="$2,$3" --screenshot="$work/$4.png" "file://$1" 2> /dev/null
}

g2l view "$demo/store.zarr" --out "$work/view.html"
picture "$demo/report/report.html" 1100 1300 report
picture "$work/view.html" 1100 940 view
python - "$demo" "$work" "$here" << 'PYTHON'
import sys
from pathlib import Path

from PIL import Image

demo, work, here = map(Path, sys.argv[1:])
for name in ("report", "view"):
    Image.open(work / f"{name}.png").convert("RGB").quantize(128).save(here / f"{name}.png", optimize=True)
picture = Image.open(demo / "store.qc" / "p01-1.jpg")
small = picture.resize((900, 900 * picture.height // picture.width), Image.Resampling.LANCZOS)
small.save(here / "overview.jpg", quality=72, optimize=True, progressive=True)
PYTHON

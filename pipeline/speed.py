"""What `g2l measure --card` leaves in a run folder, for reports. Imports nothing heavy."""

from pathlib import Path
from typing import Any

from g2l_core.files import parse_json

MEASURED = "measure.json"


def recorded_speed(run: Path, weights_digest: str) -> str:
    """What `g2l measure --card` found for a run's student, in words; empty where nothing is known of these weights."""
    try:
        found: Any = parse_json((run / MEASURED).read_text(encoding="utf-8"))
        if found["weights_digest"] != weights_digest:
            return ""
        own = [row for row in found["rows"] if row["patches_per_s"] and not row["name"].startswith("teacher ")]
        paces = [f"{row['patches_per_s']:,.3g} patches/s in {row['runtime']}" for row in own]
        return f"{'; '.join(paces)} ({found['threads']} thread{'s' * (found['threads'] > 1)}, CPU)" if paces else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""

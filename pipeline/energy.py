"""The energy that the processor takes, as Linux counts it (RAPL)."""

from collections.abc import Mapping
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
"""Linux, Documentation/power/powercap/powercap.rst: each zone counts microjoules in energy_uj, and begins again at 0
after max_energy_range_uj."""


class EnergyMeter:
    """Counts from its making. Processor packages are counted; their parts (cores, memory) are in them, or are left out.

    Attributes:
        words: How energy is counted, or why it is not.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1)
        self._begin: dict[Path, int] = {}
        self.words = "not measured: this machine has no counter of it (RAPL)"
        try:
            self._begin = {zone: _count(zone, "energy_uj") for zone in zones if _is_package(zone)}
            self._range = {zone: _count(zone, "max_energy_range_uj") for zone in self._begin}
        except PermissionError as error:
            self._begin = {}
            self.words = f"not measured: {error.filename} is readable by root only"
        except (OSError, ValueError) as error:
            self._begin = {}
            self.words = f"not measured: the counter cannot be read ({error})"
        if self._begin:
            self.words = f"of {len(self._begin)} processor package{'s' * (len(self._begin) > 1)} whole, by RAPL"

    def joules(self) -> float | None:
        """Joules since it was made, of everything that ran; None where they are not counted."""
        if not self._begin:
            return None
        try:
            now: Mapping[Path, int] = {zone: _count(zone, "energy_uj") for zone in self._begin}
        except (OSError, ValueError):
            return None
        return sum((now[zone] - begin) % (self._range[zone] + 1) for zone, begin in self._begin.items()) / 1e6


def _count(zone: Path, name: str) -> int:
    return int((zone / name).read_text(encoding="ascii"))


def _is_package(zone: Path) -> bool:
    return (zone / "name").read_text(encoding="ascii").startswith("package")

"""What Linux says of power, heat and network, from files under /sys and /proc; nothing is started or asked over D-Bus."""

from __future__ import annotations

from pathlib import Path

from pocketfed.client_sdk.conditions import Readings

SENSIBLE_C = (-40.0, 150.0)  # some zones say -273 or 0.1 °C where no sensor is
METERED_DRIVERS = frozenset(
    {"rndis_host", "ipheth", "cdc_mbim", "qmi_wwan", "cdc_ncm"}
)  # modems, and phones that share theirs


class LinuxReader:
    """Reads anew at every call.

    A machine without a battery runs on mains: it counts as charging, and its battery as unknown. Whether somebody uses the
    machine no file says; `idle` stays unknown.

    Args:
        sys, proc: where the kernel's files are.
    """

    def __init__(self, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> None:
        self._sys, self._proc = sys, proc

    def __call__(self) -> Readings:
        charging, battery = self._power()
        return Readings(charging, battery, self._metered(), None, self._temperature())

    def _power(self) -> tuple[bool | None, float | None]:
        supplies = self._sys / "class" / "power_supply"
        try:
            names = sorted(p.name for p in supplies.iterdir())
        except OSError:
            return None, None
        plugged, states, levels = False, list[str](), list[float]()
        for supply in (supplies / name for name in names):
            if _text(supply / "scope") == "Device":
                continue  # a mouse's or a headset's
            if _text(supply / "type") == "Battery":
                states.append(_text(supply / "status"))
                level = _number(supply / "capacity")
                if level is not None:
                    levels.append(level)
            elif _text(supply / "online") not in ("", "0"):
                plugged = True
        if not states:
            return True, None
        known = plugged or any(s in ("Charging", "Full", "Not charging", "Discharging") for s in states)
        charging = plugged or any(s in ("Charging", "Full") for s in states)
        return (charging if known else None), (sum(levels) / len(levels) if levels else None)

    def _temperature(self) -> float | None:
        """Of the hottest zone, in °C."""
        zones = (self._sys / "class" / "thermal").glob("thermal_zone*/temp")
        degrees = [milli / 1000 for milli in map(_number, zones) if milli is not None]
        return max((d for d in degrees if SENSIBLE_C[0] < d < SENSIBLE_C[1] and d != 0), default=None)

    def _metered(self) -> bool | None:
        """True over a modem or a phone. Whether a Wi-Fi or cable is metered only its owner knows: None."""
        interface = self._default_interface()
        if not interface:
            return None
        device = self._sys / "class" / "net" / interface
        kind = [line for line in _text(device / "uevent").splitlines() if line.startswith("DEVTYPE=")]
        try:
            driver = (device / "device" / "driver").resolve(strict=True).name
        except OSError:
            driver = ""
        is_modem = "DEVTYPE=wwan" in kind or interface.startswith(("wwan", "ppp", "rmnet"))
        return True if is_modem or driver in METERED_DRIVERS else None

    def _default_interface(self) -> str:
        """Which interface the IPv4 default route with the lowest metric goes through."""
        routes = [line.split() for line in _text(self._proc / "net" / "route").splitlines()[1:]]
        default = [r for r in routes if len(r) > 7 and r[1] == r[7] == "00000000"]
        return min(default, key=lambda r: int(r[6]) if r[6].isdigit() else 1 << 32)[0] if default else ""


def _text(path: Path) -> str:
    """Empty where it cannot be read: drivers answer with all sorts of errors."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None

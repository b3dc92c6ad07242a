"""Where the devices of a fleet are: whether they are there, what is left of their batteries, and who was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocketfed.simulations.fleet import FleetDevice, Journey, Rules, Visit

LEAST_S = 0.001  # a battery that lasts for less is empty: sums of floats are rounded


class Whereabouts:
    """What is known of it at the moment of a clock that never goes back.

    Args:
        profiles: node -> its device.
    """

    def __init__(self, profiles: Mapping[int, FleetDevice], rules: Rules) -> None:
        self.profiles, self.rules = profiles, rules
        self._away: dict[int, float] = {}  # until when
        self._worked: dict[tuple[int, float], float] = {}  # s off the charger, by node and its visit's beginning

    def next_there(self, node: int, at: float) -> float:
        """The first moment from `at` on at which a device is there and can work; infinite if it never can."""
        profile, at = self.profiles[node], max(at, self._away.get(node, 0.0))
        repeats = at + 2 * profile.period
        while at < repeats:
            at = profile.next_there(at)
            visit = profile.visit(at)
            if visit is None or self._left_s(node, visit) > LEAST_S:
                return at
            at = visit.end
        return math.inf

    def set_out(self, node: int, whole: Journey) -> Journey:
        """A device takes an assignment: how it fares if its stay, or its battery, ends meanwhile."""
        journey = whole.left(self._leaves(node, whole.begin, whole.end))
        self._use(node, journey.begin, journey.end)
        if journey.silent:
            self.lose(node, journey.end)
        return journey

    def stop(self, node: int, journey: Journey, at: float) -> Journey:
        """A device is told to stop: what it would have done, and where it would have been lost, never was."""
        if at >= journey.end:
            return journey
        self._use(node, at, journey.end, -1)
        if journey.silent:
            self._away.pop(node, None)
        return journey.stop(at)

    def lose(self, node: int, at: float) -> None:
        self._away[node] = at + self.rules.away_s

    def _left_s(self, node: int, visit: Visit) -> float:
        """Seconds of work that a visit's battery still has."""
        return self.rules.work_s(self.profiles[node], visit) - self._worked.get((node, visit.begin), 0.0)

    def _leaves(self, node: int, at: float, until: float) -> float:
        """When a device has to go that works from `at` on; infinite if it can stay `until` then."""
        while at < until:
            visit = self.profiles[node].visit(at)
            if visit is None:
                return at
            empty = at + max(0.0, self._left_s(node, visit))
            if empty < min(visit.end, until):
                return empty
            at = visit.end
        return math.inf

    def _use(self, node: int, begin: float, end: float, times: int = 1) -> None:
        """Work from `begin` to `end` drains the batteries of those visits; `times` -1 takes it back."""
        while begin < end and (visit := self.profiles[node].visit(begin)) is not None:
            if not visit.charging:
                place = (node, visit.begin)
                self._worked[place] = self._worked.get(place, 0.0) + times * (min(end, visit.end) - begin)
            begin = visit.end

    # ---- going on where another process was left ---------------------------------------------------------------------

    def forget(self, now: float) -> None:
        """What is over matters no more."""
        self._away = {node: until for node, until in self._away.items() if until > now}
        self._worked = {place: s for place, s in self._worked.items() if self._end(*place) > now}

    def _end(self, node: int, begin: float) -> float:
        visit = self.profiles[node].visit(begin)
        return math.inf if visit is None else visit.end

    def capture(self) -> dict[str, Any]:
        return {"away": dict(self._away), "worked": dict(self._worked)}

    def recall(self, held: Mapping[str, Any]) -> None:
        self._away, self._worked = dict(held["away"]), dict(held["worked"])

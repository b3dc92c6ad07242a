"""Whether the app lets the device take part in a run: asked once, before anything is fetched for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pocketfed.client_sdk.errors import RunRefused
from pocketfed.client_sdk.home import read_json, write_json
from pocketfed.client_sdk.link import log
from pocketfed.client_sdk.outgoing import UpdateForm

REMEMBERED = 32  # answers


@dataclass(frozen=True)
class RunDescription:
    """What a run declares: what is trained, and what leaves the device for it, in which form.

    With every update goes the number of examples besides; nothing else does.
    """

    run: int
    artifact_version: str
    trainable_set: str
    form: UpdateForm

    def __str__(self) -> str:
        """
        >>> str(RunDescription(1, "ab12", "lora:8", UpdateForm("int8", 2.0, metrics=("loss",))))
        'run 1 trains lora:8 and collects: updates as int8, clipped to norm 2; number of examples, loss'
        """
        form = self.form
        parts = [f"updates as {form.codec}"]
        parts += [f"without {', '.join(form.private)}"] if form.private else []
        parts += [f"with {', '.join(form.frozen)} left as it is"] if form.frozen else []
        parts += [f"of LoRA's first {form.lora_rank} ranks"] if form.lora_rank else []
        parts += [f"clipped to norm {form.clip_norm:g}"] if form.clip_norm else []
        parts += [f"with noise of {form.noise:g} times that norm a value"] if form.noise else []
        numbers = ", ".join(("number of examples", *form.metrics))
        return f"run {self.run} trains {self.trainable_set} and collects: {', '.join(parts)}; {numbers}"


Accept = Callable[[RunDescription], bool | str]  # True; or False, or why not, in words that the coordinator may read


class Consent:
    """The app's answers, by what was described: the same description gets the same answer."""

    def __init__(self, home: Path, accept: Accept | None) -> None:
        self._path, self._accept = home / "consent.json", accept
        self._last: RunDescription | None = None

    def require(self, run: RunDescription) -> None:
        """
        Raises:
            RunRefused: the app does not want it.
        """
        if run != self._last:
            self._last = run
            log.info("%s", run)
        if self._accept is None:
            return
        key = hashlib.sha256(json.dumps(dataclasses.asdict(run), sort_keys=True).encode()).hexdigest()
        answers = read_json(self._path)
        if key not in answers:
            answers[key] = self._ask(run)
            try:
                write_json(self._path, dict(list(answers.items())[-REMEMBERED:]))
            except OSError as error:
                log.warning("the app's answer could not be written down, and is asked for again: %s", error)
        if answers[key]:
            raise RunRefused(f"the app takes no part in run {run.run}: {answers[key]}")

    def _ask(self, run: RunDescription) -> str:
        """Why not; "" for yes. A callback that fails has not agreed."""
        assert self._accept is not None
        try:
            answer = self._accept(run)
        except Exception as error:
            log.exception("the app's accept callback failed")
            return f"its callback failed with {type(error).__name__}"
        return "" if answer is True else answer or "it declines what the run would collect"

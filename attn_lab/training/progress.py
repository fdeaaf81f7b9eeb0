"""Rates and the progress line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping


class Progress:
    """Measures the rate of updates and prints a line every few seconds.

    The first update, which compiles, and what happens in `paused` count in no rate.

    Args:
      steps: number of the last update.
      unit: what one update processes, such as `("tokens", 768)`.
      seconds: between lines; 0 prints none.
    """

    def __init__(self, steps: int, unit: tuple[str, int] | None, seconds: float):
        self._steps, self._unit, self._seconds = steps, unit, seconds
        self._begin: tuple[int, float] | None = None
        self._printed = 0.0

    def due(self) -> bool:
        """Whether it is time for a line; always so after the first update."""
        late = self._seconds > 0 and time.monotonic() - self._printed > self._seconds
        return late or self._begin is None

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Takes note that the device has finished update `step`, with these metrics."""
        now = time.monotonic()
        if self._begin is None:
            self._begin = (step, now)
            self._marked, self._training = step, 0.0
        else:
            self._training += now - self._resumed
        self._resumed, self._step = now, step
        if self._seconds > 0 and (now - self._printed > self._seconds or step == self._steps):
            self._printed = now
            print(self._line(now, values), flush=True)

    def rates(self) -> dict[str, float]:
        """Seconds and rates of the updates since the last call, or nothing if there are none."""
        updates, seconds = self._step - self._marked, self._training
        self._marked, self._training = self._step, 0.0
        if not updates:
            return {}
        rates = {"seconds": seconds, "steps_per_second": updates / seconds}
        if self._unit is not None:
            name, count = self._unit
            rates[f"{name}_per_second"] = count * updates / seconds
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this context is not training; the device must have finished its updates."""
        yield
        self._resumed = time.monotonic()

    def _line(self, now: float, values: Mapping[str, float]) -> str:
        parts = [f"step {self._step}/{self._steps}", f"loss {values['loss']:.4f}"]
        first, start = self._begin
        if self._step > first:
            rate = (self._step - first) / (now - start)
            parts.append(f"{rate:.3g} steps/s")
            if self._unit is not None:
                name, count = self._unit
                parts.append(f"{rate * count:,.0f} {name}/s")
            left = round((self._steps - self._step) / rate)
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return "  ".join(parts)

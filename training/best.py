"""Which step had the best validation loss, and the exports of such steps."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field


@dataclass
class BestStep:
    """The best validation so far, and which exports of best steps are there.

    A kill may send the run back to its last saved state. The export that was the best one then stays until the next
    state is saved (`saved_step`), for a better one may come out otherwise when its steps are run again.
    """

    step: int | None = None
    loss: float = float("inf")
    without_improvement: int = 0  # validations since
    saved_step: int | None = None
    exported: list[int] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: dict[str, object]) -> "BestStep":
        """The best step as a saved state knows it, from `as_state`."""
        best = cls(**state)
        best.saved_step = best.step
        return best

    def as_state(self) -> dict[str, object]:
        return asdict(self)

    def improves(self, step: int, loss: float) -> bool:
        """Take note of a validation; whether it is the best one so far."""
        if self.step is not None and not math.isnan(self.loss) and not loss < self.loss:
            self.without_improvement += 1
            return False
        self.step, self.loss, self.without_improvement = step, loss, 0
        return True

    def note_export(self, remove: Callable[[int], None]) -> None:
        """The best step's export is complete: those that nothing needs any more go."""
        self.exported = [*(step for step in self.exported if step != self.step), self.step]
        self._remove_all_but({self.step, self.saved_step}, remove)

    def keep_only_best(self, remove: Callable[[int], None]) -> None:
        """The run will not go back before this best step: it is saved in a state, or the run is at its end."""
        self.saved_step = self.step
        if self.step is not None:
            self._remove_all_but({self.step}, remove)

    def note_stopgap(self, step: int) -> None:
        """A run that was stopped before any validation exported what it had; the first best step replaces it."""
        self.exported = [*self.exported, step]

    def _remove_all_but(self, kept: set[int | None], remove: Callable[[int], None]) -> None:
        for step in [step for step in self.exported if step not in kept]:
            remove(step)
            self.exported.remove(step)

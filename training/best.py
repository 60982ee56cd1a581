"""Track the step with the best validation loss, and the exported models of best steps."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field


@dataclass
class BestStep:
    """The best validation so far, and the exports of best steps that exist.

    A killed run resumes from its last saved state. The export that was best in that state (`saved_step`) is kept until
    the next state is saved, because repeating the later steps may give a different result.
    """

    step: int | None = None
    loss: float = float("inf")
    without_improvement: int = 0  # validations since the best one
    saved_step: int | None = None
    exported: list[int] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: dict[str, object]) -> "BestStep":
        """Restore the best step from a saved state, as `as_state` returned it."""
        best = cls(**state)
        best.saved_step = best.step
        return best

    def as_state(self) -> dict[str, object]:
        return asdict(self)

    def record_validation(self, step: int, loss: float) -> bool:
        """Record a validation loss; return whether it is the best so far."""
        if self.step is not None and not math.isnan(self.loss) and not loss < self.loss:
            self.without_improvement += 1
            return False
        self.step, self.loss, self.without_improvement = step, loss, 0
        return True

    def record_export(self, remove: Callable[[int], None]) -> None:
        """Record that the best step's export is complete; remove exports that are no longer needed."""
        self.exported = [*(step for step in self.exported if step != self.step), self.step]
        self._remove_all_but({self.step, self.saved_step}, remove)

    def keep_only_best(self, remove: Callable[[int], None]) -> None:
        """Remove all other exports, once the best step is in a saved state or the run has ended."""
        self.saved_step = self.step
        if self.step is not None:
            self._remove_all_but({self.step}, remove)

    def record_interim_export(self, step: int) -> None:
        """Record the export of a run stopped before any validation; the first best step replaces it."""
        self.exported = [*self.exported, step]

    def _remove_all_but(self, kept: set[int | None], remove: Callable[[int], None]) -> None:
        for step in [step for step in self.exported if step not in kept]:
            remove(step)
            self.exported.remove(step)

"""When a run stops early: how long its validation loss has not fallen."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """The course of the validation loss, as far as early stopping asks for it."""

    step: int = 0
    """Of the newest validation."""
    lowest: float = math.inf
    lowest_step: int = 0
    """Where the loss was lowest."""
    since: int = 0
    """Validations after it."""

    def after(self, step: int, loss: float) -> "Patience":
        """What it is once the validation of a step is known; a loss that is no number is not lower than any."""
        return Patience(step, loss, step, 0) if loss < self.lowest else Patience(step, self.lowest, self.lowest_step, self.since + 1)

    @property
    def sentence(self) -> str:
        """What to say of a run that has stopped."""
        return (
            f"early_stopping: ends after step {self.step}, since the validation loss has not fallen below its {self.lowest:.4f} "
            f"of step {self.lowest_step} in {self.since} validations; the model is that of the last step"
        )

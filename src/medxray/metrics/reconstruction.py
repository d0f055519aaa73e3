"""How far a reconstruction is from its image."""

from collections.abc import Sequence

import numpy as np

from medxray.metrics import StudyMean


class ReconstructionError(StudyMean):
    """Mean over studies of the reconstruction error; lower is better.

    Predictions are each study's error as the model measured it, such as the mean squared difference over the
    masked patches; references are the errors that a perfect reconstruction has, zeros.
    """

    values = ("reconstruction-error",)
    higher_is_better = False
    takes = "reconstruction"

    def statistics(self, predictions: Sequence[float], references: Sequence[float]) -> np.ndarray:
        errors = np.array(predictions, dtype=np.float64) - np.array(references, dtype=np.float64)
        return np.abs(errors)[:, None]

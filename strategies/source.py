"""The source model as it is: no adaptation, the line every adapter has to beat."""

from __future__ import annotations

from torch import Tensor

from contlearn.strategies.adapter import Adapter


class Source(Adapter):
    """No adaptation: the model in evaluation mode. Stores nothing."""

    watched_for_collapse = False
    not_exportable = "it adapts nothing; export the model itself as an inference graph"

    def configure(self) -> None:
        """Nothing adapts."""

    def adapt(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)``."""
        return self.predict(x)

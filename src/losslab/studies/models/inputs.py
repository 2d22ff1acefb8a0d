"""What a network is to take and to tell apart, and the refusal of what it cannot."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Inputs:
    """One input's shape and the number of classes.

    Attributes:
        shape: Without the batch: (channels, height, width) of images, (length,) of texts.
        classes: Number of logits.
        tokens: Size of the vocabulary where inputs are token ids; None where they are numbers.
    """

    shape: tuple[int, ...]
    classes: int
    tokens: int | None = None

    def channels(self, model: str) -> int:
        """The number of channels.

        Raises:
            ValueError: If these are not images.
        """
        if self.tokens is not None or len(self.shape) != 3:
            raise ValueError(
                f"model.name: {model} takes (channels, height, width), got {self._described()}; "
                f"use {'mlp' if self.tokens is None else 'bert_tiny'}"
            )
        return self.shape[0]

    def numbers(self, model: str) -> tuple[int, ...]:
        """The shape.

        Raises:
            ValueError: If these are token ids, which no arithmetic should be done with.
        """
        if self.tokens is not None:
            raise ValueError(f"model.name: {model} takes numbers, got {self._described()}; use bert_tiny")
        return self.shape

    def length(self, model: str) -> int:
        """The number of tokens of one text.

        Raises:
            ValueError: If these are not texts.
        """
        if self.tokens is None:
            remedy = "simple_cnn" if len(self.shape) == 3 else "mlp"
            raise ValueError(f"model.name: {model} takes texts, got {self._described()}; use {remedy}, or sst2 as data")
        return self.shape[0]

    def _described(self) -> str:
        return f"texts of {self.shape[0]} tokens" if self.tokens is not None else str(self.shape)

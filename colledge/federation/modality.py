"""What the examples of a federation are, images or text: what all nodes must see alike, and how each reads its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from colledge.data.image_files import Split
from colledge.data.images import ImageSettings, image_settings, load_images
from colledge.data.labelled import Labelled
from colledge.data.text.reading.examples import split_examples
from colledge.data.text.source import TextSettings, load_text, read_texts, text_rows
from colledge.data.text.tokenizer import vocabulary_digest
from colledge.data.text.tokens import Tokenizer
from colledge.errors import DataError


class Modality(Protocol):
    """A kind of examples; what it reads, it reads when it is first asked.

    `judged` says what accuracy is a share of. `loss` is the one by which a training step is timed, `takers` are the
    architectures that take such rows.
    """

    judged: str
    loss: str
    takers: tuple[str, ...]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row of a model's input."""

    @property
    def num_classes(self) -> int:
        """The classes that a row, or a token of it, can belong to."""

    @property
    def model_sizes(self) -> Mapping[str, JsonValue]:
        """What follows from the data in a model's configuration."""

    @property
    def greeting(self) -> Mapping[str, JsonValue]:
        """What all nodes must agree on, by name."""

    def common(self, split: Split) -> Labelled:
        """Return one split of the common data.

        Raises:
            DataError: They are missing or damaged.
        """

    def own(self, source: Path) -> Labelled:
        """Return what a node learns from that has data of its own.

        Raises:
            DataError: They are missing, damaged, or look otherwise than they should.
        """


class ImageModality:
    """Images with a class each (a `Modality`).

    Args:
        source: Of the common data; None where there are none.
        wanted: What images look like; None is like the common data.
    """

    judged, loss = "test images", "cross_entropy"
    takers: tuple[str, ...] = ("cnn", "mlp", "resnet")

    def __init__(self, source: str | None, wanted: ImageSettings | None) -> None:
        self._source, self._wanted = source, wanted

    @cached_property
    def settings(self) -> ImageSettings:
        """What images look like everywhere, and how they are scaled: as wanted, else as the common data."""
        source, wanted = self._source, self._wanted
        if wanted is not None and (source is None or wanted.mean is not None):
            return wanted
        assert source is not None
        seen = image_settings(source)
        if wanted is None:
            return seen
        return wanted.model_copy(update={"mean": seen.mean, "deviation": seen.deviation})

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Channels, height and width."""
        return self.settings.shape

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.settings.num_classes

    @property
    def model_sizes(self) -> Mapping[str, JsonValue]:
        """Classes and image."""
        return {"classes": self.num_classes, "image": list(self.settings.shape)}

    @property
    def greeting(self) -> Mapping[str, JsonValue]:
        """Classes, size and scaling."""
        names, (mean, deviation) = self.settings.class_names, self.settings.scaling
        return {
            "number of classes": self.num_classes,
            "list of classes": None if names is None else list(names),
            "size of an image": list(self.settings.shape),
            "mean of pixels": list(mean),
            "deviation of pixels": list(deviation),
        }

    def common(self, split: Split) -> Labelled:
        """Return one split of the common images."""
        assert self._source is not None
        return load_images(self._source, split, self.settings)

    def own(self, source: Path) -> Labelled:
        """Return the training split of a folder."""
        return load_images(str(source), "train", self.settings)


class TextModality:
    """Rows of text, each token the label of what precedes it (a `Modality`).

    Args:
        source: Of the common data; None where there are none.
        settings: How text becomes rows.
        seed: Decides which documents are the test split.
    """

    judged, loss = "next tokens of test rows", "causal_lm"
    takers: tuple[str, ...] = ("llama",)

    def __init__(self, source: str | None, settings: TextSettings, seed: int) -> None:
        self._source, self._settings, self._seed = source, settings, seed

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._settings.load_tokenizer()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Tokens a row."""
        return (self._settings.sequence_length,)

    @property
    def num_classes(self) -> int:
        """The size of the vocabulary."""
        return len(self._tokenizer)

    @property
    def model_sizes(self) -> Mapping[str, JsonValue]:
        """The vocabulary."""
        return {"vocabulary": self.num_classes}

    @cached_property
    def greeting(self) -> Mapping[str, JsonValue]:
        """Vocabulary and length."""
        return {
            "size of the vocabulary": self.num_classes,
            "vocabulary (digest)": vocabulary_digest(self._tokenizer),
            "number of tokens a row": self._settings.sequence_length,
        }

    @cached_property
    def _splits(self) -> Mapping[Split, Labelled]:
        assert self._source is not None
        examples = read_texts(Path(self._source))
        try:
            train, test = split_examples(examples, self._settings.test_split, self._seed)
        except DataError as fault:
            raise DataError(
                f"{self._source}: {fault.message}",
                fix="give more documents, such as one a line in a .jsonl file, or a smaller data.text.test_split.",
            ) from None
        length = self._settings.sequence_length
        return {
            "train": text_rows(train, self._tokenizer, length, self._source),
            "test": text_rows(test, self._tokenizer, length, self._source),
        }

    def common(self, split: Split) -> Labelled:
        """Return the rows of the documents of one split."""
        return self._splits[split]

    def own(self, source: Path) -> Labelled:
        """Return the rows of all documents."""
        return load_text(source, self._tokenizer, self._settings.sequence_length)

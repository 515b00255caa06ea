"""HeteroFL (Diao, Ding and Tarokh, arXiv 2010.01135): one architecture, as wide at every node as the node can bear.

    parent  ┌───────┬──┐     child  ┌───────┐     a child's tensor is the leading slice of its parent's of that name;
            │  a b  │ a│            │   b   │     an element is averaged over the children that hold it, weighted by
            ├───────┘  │            └───────┘     their samples; one that nobody holds stays as it is
            └── a ─────┘

A child first gets its parent's whole model, and takes its slice; from its answer on the parent knows which to send. An
inner node says how many samples stand behind which slice, so that a tree comes to what one parent of all leaves would.

Neither the paper's scaler nor its masked cross entropy is here (ours). The first multiplies what a narrow layer gives
by what its width lacks, which the group norm behind a convolution would take out again. The second leaves the logits of
classes that a leaf has not out of its loss; all strategies here train with the same loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product

from pydantic import Field
from torch import Tensor

from colledge.errors import ConfigError
from colledge.federation.learning import LocalSettings, weighted_mean
from colledge.federation.message import MessageError, Payload
from colledge.federation.strategies.averaging import Averaging, AveragingSettings
from colledge.federation.strategy import Self
from colledge.federation.transport import NodeId
from colledge.records import Record

_MOST_SLICES = 16  # of different widths below a child

Shape = tuple[int, ...]
Shapes = dict[str, Shape]  # of a model's tensors, by name


class _Heads(Record):
    """Sizes of a Llama's attention heads, which a slice must not cut into; None of other architectures."""

    head_dim: int | None = None
    num_key_value_groups: int | None = None


class _Slice(Record):
    """A leading slice of a model, and how many samples trained it."""

    samples: int = Field(ge=0)
    shapes: Shapes


class _Answer(Record):
    """The slices that nodes below trained, a leaf's own; each is within the tensors that come with it."""

    trained: tuple[_Slice, ...]


class _State(_Answer):
    """What a node keeps: beside its answer, the shapes of its children's tensors."""

    children: dict[NodeId, Shapes]


class HeteroFL(Averaging):
    """A node of HeteroFL."""

    def __init__(self, node: Self, local: LocalSettings) -> None:
        super().__init__(node, AveragingSettings(), local)
        self._children: dict[NodeId, Shapes] = {}
        self._trained: tuple[_Slice, ...] = ()

    def receive(self, round_index: int, task: Payload | None) -> None:
        """Take this node's slice of the parent's model.

        Raises:
            MessageError: A number is not finite.
            ConfigError: The parent's model is narrower, of another architecture, or has other attention heads.
        """
        self._trained = ()
        super().receive(round_index, None if task is None else self._own_slice(task))

    def _own_slice(self, task: Payload) -> Payload:
        heads, theirs = self._heads(), task.parse(_Heads)
        if heads != theirs:
            raise ConfigError(
                f"{self._node.id!r}: attention heads are {heads.head_dim} wide here, with {heads.num_key_value_groups} "
                f"queries to a key, and {theirs.head_dim} with {theirs.num_key_value_groups} at its parent's; "
                "narrower models have fewer heads, not other ones.",
                fix="keep hidden / heads and heads / kv_heads as the parent has them.",
            )
        own = shapes_of(self._weights)
        given = shapes_of(task.tensors)
        strange = [n for n in sorted(own.keys() | given.keys()) if not _is_within(own.get(n), given.get(n))]
        if strange:
            name = strange[0]
            raise ConfigError(
                f"{self._node.id!r}: {name!r} is {_text(own.get(name))} here and {_text(given.get(name))} at its "
                "parent's, wanted a leading slice of that.",
                fix="give it its parent's architecture, no wider.",
            )
        return Payload({}, {name: leading(task.tensors[name], shape).clone() for name, shape in own.items()})

    def task(self, child: NodeId) -> Payload:
        """Return a child's slice of this node's model; all of it to a new child."""
        shapes = self._children.get(child, shapes_of(self._weights))
        tensors = {name: leading(self._weights[name], shape) for name, shape in shapes.items()}
        return Payload(self._heads().model_dump(mode="json"), tensors)

    def _heads(self) -> _Heads:
        sizes = self._node.model.spec.config
        if sizes["architecture"] != "llama":
            return _Heads()
        heads = sizes["heads"]
        return _Heads(head_dim=sizes["hidden"] // heads, num_key_value_groups=heads // sizes["kv_heads"])

    def check(self, child: NodeId, answer: Payload) -> None:
        """Check that an answer is a leading slice of this model, and what trained of it.

        Their number is limited: averaging takes time that grows with its power.
        """
        given, own = shapes_of(answer.tensors), shapes_of(self._weights)
        trained = answer.parse(_Answer).trained
        if len(trained) > _MOST_SLICES:
            raise MessageError(
                f"a malformed payload: {len(trained)} slices, at most {_MOST_SLICES} are taken."
            )
        for shapes, whole in ((given, own), *((part.shapes, given) for part in trained)):
            for name in shapes.keys() | whole.keys():
                if not _is_within(shapes.get(name), whole.get(name)):
                    raise MessageError(
                        f"a malformed payload: {name!r} is {_text(shapes.get(name))}, wanted a leading slice of "
                        f"{_text(whole.get(name))}."
                    )
        for name, shape in given.items():
            answer.tensor(name, shape)

    def merge(self, answers: Mapping[NodeId, Payload]) -> None:
        """Average every element over the children that hold it."""
        trained = {child: answer.parse(_Answer).trained for child, answer in answers.items()}
        self._children |= {child: shapes_of(answer.tensors) for child, answer in answers.items()}
        self._trained = joined([part for parts in trained.values() for part in parts])
        merged = {}
        for name, tensor in self._weights.items():
            parts = [
                (answers[child].tensors[name], [(part.samples, part.shapes[name]) for part in trained[child]])
                for child in answers
            ]
            merged[name] = overlapping_mean(tensor, parts)
        self._set(merged)

    def learn(self) -> None:
        """Train on the own data."""
        super().learn()
        if self._node.data is not None:
            own = _Slice(samples=self._node.data.num_rows, shapes=shapes_of(self._weights))
            self._trained = joined([*self._trained, own])

    def answer(self) -> Payload:
        """Return this node's model, and how many samples stand behind which slice of it."""
        return Payload(_Answer(trained=self._trained).model_dump(mode="json"), self._weights)

    def forget(self, child: NodeId) -> None:
        """Drop what is known of a child."""
        self._children.pop(child, None)

    def state(self) -> Payload:
        """Return the answer, and the shapes of the children's tensors."""
        state = _State(trained=self._trained, children=self._children)
        return Payload(state.model_dump(mode="json"), self._weights)

    def restore(self, state: Payload) -> None:
        """Go on from such a state."""
        kept = state.parse(_State)
        self._trained, self._children = kept.trained, dict(kept.children)
        self._set(dict(state.tensors))


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the shapes of some tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def leading(tensor: Tensor, shape: Shape) -> Tensor:
    """Return the first elements of every dimension, as a view."""
    return tensor[tuple(map(slice, shape))]


def joined(parts: Sequence[_Slice]) -> tuple[_Slice, ...]:
    """Return slices of which no two are of the same shapes."""
    samples: dict[tuple[tuple[str, Shape], ...], int] = {}
    for part in parts:
        key = tuple(sorted(part.shapes.items()))
        samples[key] = samples.get(key, 0) + part.samples
    return tuple(_Slice(samples=count, shapes=dict(shapes)) for shapes, count in samples.items())


def overlapping_mean(whole: Tensor, parts: Sequence[tuple[Tensor, Sequence[tuple[int, Shape]]]]) -> Tensor:
    """Return the mean of every element over the parts that hold it; where there is none, the element of `whole`.

    Args:
        whole: Of any shape.
        parts: One or more leading slices of such a tensor, and how many samples stand behind which slice of each.
    """
    merged = whole.to(parts[0][0].dtype, copy=True)
    shapes = [shape for _, held in parts for _, shape in held]
    for box in _boxes(tuple(whole.shape), shapes):
        ends = tuple(side.stop for side in box)
        weighted = [
            (sum(n for n, shape in held if _is_within(ends, shape)), tensor) for tensor, held in parts
        ]
        heavy = [(weight, tensor[box]) for weight, tensor in weighted if weight]
        if heavy:
            merged[box] = weighted_mean(heavy)
    return merged


def _boxes(shape: Shape, slices: Sequence[Shape]) -> Iterator[tuple[slice, ...]]:
    """Yield the boxes of a tensor that the ends of some leading slices cut it into."""
    ends = (sorted({0, side, *(one[axis] for one in slices)}) for axis, side in enumerate(shape))
    for box in product(*map(pairwise, ends)):
        yield tuple(slice(*side) for side in box)


def _is_within(shape: Shape | None, whole: Shape | None) -> bool:
    """Return whether a tensor of one shape can be a leading slice of one of the other; None is no tensor."""
    if shape is None or whole is None or len(shape) != len(whole):
        return False
    return all(0 < part <= side for part, side in zip(shape, whole, strict=True))


def _text(shape: Shape | None) -> str:
    return "missing" if shape is None else str(list(shape))

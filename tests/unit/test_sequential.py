"""Architectures of our own: exact wherever they are cut, rows independent, as large as their papers say."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from colledge.errors import ModelError
from colledge.models import ModelSpec, SequentialModel, build_model, initial_weights
from colledge.models.architectures import Layer, Mlp
from colledge.models.float64 import keep_float64
from colledge.models.modular import GATES, Modular
from colledge.models.sequential import ARCHITECTURES

IMAGE = {"image": (3, 16, 16), "classes": 7}
CONFIGS: dict[str, dict[str, Any]] = {
    "cnn": {"architecture": "cnn", "channels": (6, 10), **IMAGE},
    "mlp": {"architecture": "mlp", "hidden": (12, 12, 8), **IMAGE},
    "resnet-8": {"architecture": "resnet", "depth": 8, "width": 6, **IMAGE},
    "resnet-10": {"architecture": "resnet", "depth": 10, "width": 4, **IMAGE},
    "resnet-20-bottleneck": {"architecture": "resnet", "depth": 20, "width": 2, "bottleneck": True, **IMAGE},
    "llama": {
        "architecture": "llama",
        "vocabulary": 61,
        "hidden": 32,
        "intermediate": 46,
        "heads": 8,
        "kv_heads": 4,
        "blocks": 2,
    },
}
CONFIGS |= {
    f"modular-{name}": {
        "architecture": "modular",
        "base": CONFIGS[name],
        "modules": 3,
        "top_k": 2,
        "width": 0.5,
    }
    for name in ("cnn", "mlp", "resnet-10", "resnet-20-bottleneck", "llama")
}


def model_of(name: str) -> SequentialModel:
    return SequentialModel(CONFIGS[name])


def rows_of(name: str, num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name.endswith("llama"):
        return torch.randint(61, (num_rows, 9), generator=generator)
    return torch.randn((num_rows, *IMAGE["image"]), generator=generator, dtype=torch.float64)


def context_of(name: str, num_rows: int) -> dict[str, Tensor]:
    context = {}
    if name.endswith("llama"):
        context["attention_mask"] = (torch.arange(9) < torch.arange(4, 4 + num_rows)[:, None]).long()
    if name.startswith("modular"):
        context[GATES] = gates_of(model_of(name), num_rows)
    return context


def gates_of(model: SequentialModel, num_rows: int) -> Tensor:
    """Return gates of which no two rows in turn use the same modules."""
    modular = Modular.model_validate(model.spec.config)
    least = torch.arange(num_rows)[:, None] + torch.arange(modular.num_blocks)
    own = torch.nn.functional.one_hot(least % modular.modules, modular.modules)
    generator = torch.Generator().manual_seed(2)
    return torch.rand(own.shape, generator=generator, dtype=torch.float64) - 5 * own


def run(
    model: SequentialModel, cuts: list[int], x: Tensor, context: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of a model in parts, and the gradients of the sum of its squares."""
    weights = initial_weights(model.spec, seed=3)
    parameters: dict[str, torch.nn.Parameter] = {}
    row_shape = tuple(x.shape[1:])
    for layers in pairwise([0, *cuts, len(model.layer_names)]):
        assert tuple(x.shape[1:]) == model.boundary_shape(row_shape, layers[0])
        stage, own = model.build_stage(layers, torch.float64)
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(weights[key])
        x = stage(x, context)
        parameters |= own
    assert set(parameters) == set(weights)
    x.square().sum().backward()
    gradients = {}
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        gradients[key] = parameter.grad
    return x.detach(), gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_parts_is_the_whole_bit_for_bit(name: str) -> None:
    model, x, context = model_of(name), rows_of(name, 3), context_of(name, 3)
    inner = range(1, len(model.layer_names))
    output, gradients = run(model, [], x, context)
    assert output.shape[1:] == model.boundary_shape(tuple(x.shape[1:]), len(model.layer_names))
    assert all(bool(g.any()) for g in gradients.values())
    for cuts in [list(inner), *([cut] for cut in inner)]:
        seen, seen_gradients = run(model, cuts, x, context)
        assert torch.equal(seen, output)
        assert all(torch.equal(seen_gradients[key], gradients[key]) for key in gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_rows_that_enter_anywhere(name: str) -> None:
    model, whole = model_of(name), tuple(rows_of(name, 1).shape[1:])
    num_layers = len(model.layer_names)
    for first, last in combinations(range(num_layers + 1), 2):
        entering = model.boundary_shape(whole, first)
        assert model.boundary_shape(entering, last, first) == model.boundary_shape(whole, last)
    assert model.boundary_shape(whole, num_layers)[-1] == model.output_width


@pytest.mark.parametrize("name", CONFIGS)
def test_no_row_depends_on_another(name: str) -> None:
    model, x, context = model_of(name), rows_of(name, 3), context_of(name, 3)
    together, _ = run(model, [], x, context)
    for row in range(3):
        alone, _ = run(model, [], x[[row]], {key: value[[row]] for key, value in context.items()})
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)


def test_the_llama_is_transformers_own() -> None:
    model, x, context = model_of("llama"), rows_of("llama", 3), context_of("llama", 3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=46,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_hidden_layers=2,
        attn_implementation="eager",
    )
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    keep_float64(theirs)
    names = {"embedding.": "model.embed_tokens.", "head.norm.": "model.norm.", "head.linear.": "lm_head."}
    names |= {f"block.{index}.decoder.": f"model.layers.{index}." for index in range(2)}
    values = initial_weights(model.spec, seed=3)
    renamed = {
        new + key.removeprefix(old): value
        for key, value in values.items()
        for old, new in names.items()
        if key.startswith(old)
    }
    theirs.load_state_dict(renamed)
    output, _ = run(model, [], x, context)
    kept = context["attention_mask"].bool()
    assert torch.equal(output[kept], theirs(input_ids=x, **context).logits[kept])


CIFAR = {"image": (3, 32, 32), "classes": 10}


def num_parameters(**config: object) -> int:
    model = SequentialModel({**CIFAR, **config})
    layers = (model.layer_parameters(index) for index in range(len(model.layer_names)))
    return sum(prod(shape) for layer in layers for shape in layer.values())


def num_flops(depth: int) -> int:
    """Return those of one image's forward."""
    model = SequentialModel({**CIFAR, "architecture": "resnet", "depth": depth, "bottleneck": True})
    stage, _ = model.build_stage((0, len(model.layer_names)), torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage(torch.zeros(1, 3, 32, 32), {})
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("depth", "published"), [(20, 0.27e6), (56, 0.85e6), (110, 1.73e6), (18, 11.17e6), (10, 4.90e6)]
)
def test_residual_networks_are_as_large_as_published(depth: int, published: float) -> None:
    assert num_parameters(architecture="resnet", depth=depth) == pytest.approx(published, abs=published / 150)


def test_fedgkt_leaves_to_the_edge_what_its_paper_counts() -> None:
    counts = {
        depth: num_parameters(architecture="resnet", depth=depth, bottleneck=True) for depth in (8, 56, 110)
    }
    assert counts == {8: 10_586, 56: 591_322, 110: 1_147_738}
    flops = {depth: num_flops(depth) for depth in counts}
    # The paper has 11 K, 591 K and 1,150 K parameters: 54 and 105 times as many, by its rounded counts.
    assert [round(counts[depth] / counts[8], 1) for depth in (56, 110)] == [55.9, 108.4]
    assert [round(flops[depth] / flops[8], 1) for depth in (56, 110)] == [9.1, 17.4]  # 9 and 17
    server = SequentialModel({**CIFAR, "architecture": "resnet", "depth": 56, "bottleneck": True})
    assert server.boundary_shape((3, 32, 32), 1) == (16, 32, 32)


def test_beginnings_depend_on_the_seed_and_the_name_alone() -> None:
    shallow, deep = (
        initial_weights(SequentialModel({**CONFIGS["llama"], "blocks": n}).spec, seed=5) for n in (1, 3)
    )
    assert set(shallow) < set(deep)
    assert all(torch.equal(deep[name], value) for name, value in shallow.items())
    other = initial_weights(SequentialModel({**CONFIGS["llama"], "blocks": 1}).spec, seed=6)
    assert {name for name, value in shallow.items() if torch.equal(other[name], value)} == {
        name for name in shallow if "norm" in name
    }


@pytest.mark.parametrize(
    ("name", "change", "refusal"),
    [
        ("cnn", {"architecture": "vgg"}, "architecture is 'vgg', wanted one of cnn, mlp, resnet, llama"),
        ("cnn", {"width": 3}, "architecture cnn: unknown key 'width'"),
        ("cnn", {"channels": ()}, "architecture cnn: channels"),
        ("cnn", {"channels": (2,) * 5}, "an image of 16 x 16 cannot be halved 5 times"),
        ("mlp", {"image": (3, 0, 5)}, r"architecture mlp: image\[1\]"),
        ("resnet-8", {"depth": 9}, "architecture resnet: depth"),
        ("resnet-10", {"bottleneck": True}, "depth 10 has no bottlenecks; 8, 20, 56 and 110 have"),
        ("llama", {"heads": 5}, "hidden 32 is no multiple of twice the heads"),
        ("llama", {"kv_heads": 3}, "heads 8 is no multiple of kv_heads"),
    ],
)
def test_what_is_no_configuration_is_refused(name: str, change: dict[str, object], refusal: str) -> None:
    with pytest.raises(ModelError, match=refusal):
        SequentialModel({**CONFIGS[name], **change})


def test_a_spec_gives_the_same_model_and_refuses_narrow_numbers() -> None:
    spec = ModelSpec.model_validate_json(model_of("resnet-8").spec.to_json())
    assert build_model(spec).layer_names == ("stem", "block.0", "block.1", "block.2", "head")
    with pytest.raises(ModelError, match="mixed_precision is set for a sequential model"):
        build_model(spec.model_copy(update={"mixed_precision": "bfloat16"}))
    with pytest.raises(ModelError, match=r"rows of \[3, 16\] do not fit layer stem"):
        build_model(spec).boundary_shape((3, 16), 1)


def test_layers_with_running_statistics_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithBatchNorm(Mlp):
        def layers(self) -> tuple[Layer, ...]:
            return (Layer("norm", "norm", lambda: torch.nn.BatchNorm2d(3)), *super().layers())

    monkeypatch.setitem(ARCHITECTURES, "mlp", WithBatchNorm)  # type: ignore[index]
    with pytest.raises(ModelError, match="layer norm holds 'running_mean', which is no parameter"):
        model_of("mlp")

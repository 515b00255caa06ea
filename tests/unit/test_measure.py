from __future__ import annotations

import random
from functools import partial
from itertools import chain, cycle

import psutil
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from colledge.launch.profiling import noise_warnings, sample_counts, shard_parts
from colledge.measure import (
    Effort,
    Workload,
    count_layer,
    count_model,
    fit_link,
    resident_bytes,
    runtime_bytes,
    spread_of,
    time_layer,
    usable_bytes,
)
from colledge.models import HuggingFaceCausalLM
from colledge.parallel.clock import Clock
from colledge.parallel.setup import build_optimizer
from colledge.profiles import DeviceProfile, ModelProfile, PoolProfile, PowerMode
from colledge.settings import Emulation, OptimizerSettings

SEQUENCE, HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS = 16, 32, 48, 64, 4, 2
FLOAT = 4


def llama(**changes: object) -> HuggingFaceCausalLM:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
    }
    return HuggingFaceCausalLM(LlamaConfig(**{**values, **changes}).to_dict())


def gpt2() -> HuggingFaceCausalLM:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_positions=SEQUENCE)
    return HuggingFaceCausalLM(config.to_dict())


def workload(model: HuggingFaceCausalLM, dtype: torch.dtype = torch.float32) -> Workload:
    optimizer = partial(build_optimizer, OptimizerSettings())
    return Workload(model, (SEQUENCE,), dtype, torch.device("cpu"), "causal_lm", optimizer)


class Script:
    """A stopwatch that reads given seconds, one an interval."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = chain(seconds[:-3], cycle(seconds[-3:]))
        self.intervals = 0
        self.compute_s = 0.0

    def reset(self) -> None:
        self.compute_s = 0.0

    def begin_compute(self) -> None:
        self.intervals += 1

    def end_compute(self) -> None:
        self.compute_s += next(self._seconds)


EFFORT = Effort(trial_s=0.02, trials=5, least_trials=3, limit_s=10.0)
TRIAL = (0.01, 0.02, 0.004)


def test_a_row_is_the_median_of_its_trials() -> None:
    disturbed = (0.5, 0.9, 0.4)
    stopwatch = Script(*TRIAL[:2], *TRIAL, *TRIAL, *disturbed, *TRIAL)  # a look, warm-up, then trials
    (row,) = time_layer(workload(llama()), 0, [2], stopwatch, EFFORT)
    assert (row.forward_s, row.backward_s, row.update_s) == pytest.approx(TRIAL)
    assert row.samples == 2
    assert row.shard_fraction == 1.0
    assert row.spread == pytest.approx(0.0)


def test_short_layers_are_repeated_to_fill_a_trial() -> None:
    times = (0.001, 0.003)
    stopwatch = Script(*times, *times, 0.002, *times * 4, *TRIAL)
    time_layer(workload(llama()), 0, [1], stopwatch, Effort(trial_s=0.02, trials=1, least_trials=1))
    assert stopwatch.intervals == 2 + 3 + 4 * 2 + 5 * 2 + 1  # a look, first run, warm-up, 5 repeats, update


def test_a_noisy_row_gets_more_trials_and_is_marked() -> None:
    noise = [s * k for k in (1, 1, 2, 1, 2, 1, 2, 1, 2) for s in TRIAL]
    quiet, noisy = Script(*TRIAL[:2], *TRIAL), Script(*TRIAL[:2], *noise)
    (steady,) = time_layer(workload(llama()), 0, [1], quiet, EFFORT)
    (unsteady,) = time_layer(workload(llama()), 0, [1], noisy, EFFORT)
    assert steady.spread == pytest.approx(0)
    assert unsteady.spread > 0.2
    assert quiet.intervals == 2 + 3 * (1 + 5)
    assert noisy.intervals == 2 + 3 * (1 + 10)


def test_a_slow_device_is_not_asked_for_all_sample_counts() -> None:
    effort = Effort(trial_s=0.02, slow_s=2.0)
    counts = [1, 2, 4, 8]
    slow = time_layer(workload(llama()), 1, counts, Script(1.0, 1.0, 0.1), effort)
    quick = time_layer(workload(llama()), 1, counts, Script(*TRIAL), effort)
    assert [row.samples for row in slow] == [1, 2]
    assert [row.samples for row in quick] == counts


def test_a_block_is_a_third_of_three_blocks() -> None:
    one, three = (0.012, 0.02), (0.03, 0.06, 0.006)
    (row,) = time_layer(workload(llama()), 1, [1], Script(*one, *three), EFFORT)
    assert (row.forward_s, row.backward_s, row.update_s) == pytest.approx((0.01, 0.02, 0.002))


@pytest.mark.parametrize(
    ("model", "layer_index"), [(llama(), 0), (llama(), 5), (llama(num_hidden_layers=1), 1)]
)
def test_a_layer_without_others_of_its_kind_is_timed_alone(
    model: HuggingFaceCausalLM, layer_index: int
) -> None:
    (row,) = time_layer(workload(model), layer_index, [1], Script(0.012, 0.02, *TRIAL), EFFORT)
    assert (row.forward_s, row.backward_s, row.update_s) == pytest.approx(TRIAL)


def test_long_blocks_are_timed_alone() -> None:
    slow = (3.0, 5.0, 0.1)
    (row,) = time_layer(workload(llama()), 1, [1], Script(*slow[:2], *slow), EFFORT)
    assert (row.forward_s, row.backward_s, row.update_s) == pytest.approx(slow)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_layer_is_timed_for_real(make: object, dtype: torch.dtype) -> None:
    model = make()
    effort = Effort(trial_s=0.001, trials=1, least_trials=1)
    for index in range(len(model.layer_names)):
        (row,) = time_layer(workload(model, dtype), index, [2], Clock(), effort)
        assert row.forward_s > 0
        assert row.backward_s > 0
        assert row.update_s > 0


@pytest.mark.parametrize("layer_index", [1, 5])
def test_a_shard_is_timed_by_its_units(layer_index: int) -> None:
    (row,) = time_layer(workload(llama()), layer_index, [1], Script(*TRIAL), EFFORT, units=(0, 1))
    assert row.shard_fraction == 0.5
    timing = row.row("desk", "default", "block")
    assert (timing.device_kind, timing.mode, timing.layer_kind) == ("desk", "default", "block")
    assert timing.shard_fraction == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_llama_is_counted_as_by_hand(dtype: torch.dtype) -> None:
    size = dtype.itemsize
    embedding, block, *_, head = count_model(
        llama(), (SEQUENCE,), dtype, "causal_lm", workload(llama()).update
    )
    kv_size = HIDDEN // HEADS * KV_HEADS
    linear = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv_size + 3 * HIDDEN * INNER
    assert embedding.parameter_bytes == VOCABULARY * HIDDEN * size
    assert block.parameter_bytes == block.trainable_parameter_bytes == (linear + 2 * HIDDEN) * size
    assert head.parameter_bytes == (VOCABULARY * HIDDEN + HIDDEN) * size
    boundary = SEQUENCE * HIDDEN * size
    assert [layer.output_bytes_per_sample for layer in (embedding, block, head)] == [boundary, boundary, 0]
    assert embedding.saved_bytes_per_sample == SEQUENCE * 8  # the ids
    assert block.tensor is not None
    assert (block.tensor.units, block.tensor.forward_allreduces, block.tensor.backward_allreduces) == (
        2,
        2,
        2,
    )
    assert block.tensor.allreduce_bytes_per_sample == boundary
    assert embedding.tensor is None
    assert head.tied_to is None
    assert head.tensor is not None  # cut along the vocabulary: its input's gradient is summed
    assert (head.tensor.forward_allreduces, head.tensor.backward_allreduces) == (0, 1)
    assert head.tensor.allreduce_bytes_per_sample == boundary
    assert [layer.largest_gradient_bytes for layer in (embedding, block, head)] == [
        VOCABULARY * HIDDEN * size,
        HIDDEN * INNER * size,
        VOCABULARY * HIDDEN * size,
    ]
    logits = SEQUENCE * VOCABULARY * size  # beside those that are saved, their gradient and softmax's
    assert 2 * logits <= head.workspace_bytes_per_sample <= 2 * logits + 4 * boundary
    # two norms' inputs and outputs, attention's and the MLP's inputs; not what lies between two linears
    assert 4 * boundary <= block.tensor.whole_saved_bytes_per_sample <= 7 * boundary
    attention = 4 * SEQUENCE**2 * HIDDEN
    assert embedding.forward_flops_per_sample == 0
    assert head.forward_flops_per_sample == 2 * SEQUENCE * HIDDEN * VOCABULARY
    assert head.backward_flops_per_sample == 2 * head.forward_flops_per_sample
    assert block.forward_flops_per_sample == 2 * SEQUENCE * linear + attention
    # attention's backward computes the scores anew: five products for the forward's two
    assert block.backward_flops_per_sample == 4 * SEQUENCE * linear + 2.5 * attention


def test_a_gpt2_is_counted_as_by_hand() -> None:
    embedding, block, _, head = count_model(
        gpt2(), (SEQUENCE,), torch.float32, "causal_lm", workload(gpt2()).update
    )
    linear, biases, norms = 12 * HIDDEN**2, 9 * HIDDEN, 4 * HIDDEN
    assert embedding.parameter_bytes == (VOCABULARY + SEQUENCE) * HIDDEN * FLOAT
    assert block.parameter_bytes == (linear + biases + norms) * FLOAT
    assert block.forward_flops_per_sample == 2 * SEQUENCE * linear + 4 * SEQUENCE**2 * HIDDEN
    assert head.parameter_bytes == (VOCABULARY * HIDDEN + 2 * HIDDEN) * FLOAT
    assert head.tied_to == "embedding"
    assert block.tensor is not None
    assert block.tensor.units == HEADS


def test_saved_bytes_are_what_the_forward_keeps() -> None:
    layer = count_layer(workload(llama()), 1)
    rows = {
        "input, its square's norm": HIDDEN + 1,
        "normed, twice a block": 2 * 2 * HIDDEN,
        "query, key, value, attention": 2 * HIDDEN + 2 * HIDDEN // HEADS * KV_HEADS,
        "gate, up, their product": 3 * INNER,
    }
    least = SEQUENCE * sum(rows.values()) * FLOAT
    assert least < layer.saved_bytes_per_sample < 2 * least


def test_saved_bytes_predict_a_real_run() -> None:
    bytes_of = count_layer(workload(llama()), 1).saved_bytes_per_sample
    half = count_layer(workload(llama(), torch.bfloat16), 1).saved_bytes_per_sample
    assert 0.5 * bytes_of <= half < 0.8 * bytes_of  # norms compute in float32


def test_a_tied_head_says_so() -> None:
    layers = count_model(
        llama(tie_word_embeddings=True), (SEQUENCE,), torch.float32, "causal_lm", workload(llama()).update
    )
    assert [layer.tied_to for layer in layers] == [None] * 5 + ["embedding"]
    assert layers[-1].tensor is None  # a tied head stays whole
    assert [layer.name for layer in layers] == [
        "embedding", "block.0", "block.1", "block.2", "block.3", "head",
    ]  # fmt: skip


def test_link_fit_is_exact_on_exact_messages() -> None:
    fit = fit_link([(size, 0.002 + size / 1e7) for size in (1000, 100_000, 1_000_000) for _ in range(3)])
    assert fit.latency_s == pytest.approx(0.002)
    assert fit.bandwidth_bytes_per_s == pytest.approx(1e7)
    assert fit.spread == pytest.approx(0)


def test_link_fit_withstands_disturbed_messages() -> None:
    noise = random.Random(0)
    samples = [
        (size, (0.001 + size / 2e7) * noise.uniform(0.95, 1.05) + (0.3 if index == 0 else 0.0))
        for size in (1024, 65536, 1_000_000)
        for index in range(9)
    ]
    fit = fit_link(samples)
    assert fit.latency_s == pytest.approx(0.001, rel=0.1)
    assert fit.bandwidth_bytes_per_s == pytest.approx(2e7, rel=0.1)
    assert fit.spread < 0.1


def test_link_fit_of_noise_is_a_usable_link() -> None:
    fit = fit_link([(1000, 0.002), (1_000_000, 0.001)])
    assert fit.latency_s == 0
    assert fit.bandwidth_bytes_per_s == pytest.approx(1e9)
    assert fit_link([(1000, 0.0)]).bandwidth_bytes_per_s > 0


def test_spread_is_the_quartiles_distance_over_the_median() -> None:
    assert spread_of([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread_of([1.0]) == 0
    assert spread_of([0.0, 0.0, 0.0]) == 0


def test_noise_is_said_by_device_and_layer() -> None:
    mode = PowerMode(name="default", idle_w=1, compute_w=2, communicate_w=1, source="modelled")
    pool = PoolProfile(
        schema_tag="colledge/pool-profile/1",
        devices=tuple(
            DeviceProfile(id=id, kind=kind, memory_bytes=1, modes=(mode,))
            for id, kind in (("desk", "fast"), ("pi-0", "slow"), ("pi-1", "slow"))
        ),
    )
    layer = count_layer(workload(llama()), 1)
    rows = [
        {"device_kind": kind, "mode": "default", "layer_kind": "block", "samples": samples, "shard_fraction": 1,
         "forward_s": 1, "backward_s": 2, "spread": spread}
        for kind, samples, spread in (("fast", 1, 0.31), ("fast", 2, 0.25), ("slow", 1, 0.2))
    ]  # fmt: skip
    model = ModelProfile.model_validate(
        {"schema": "colledge/model-profile/1", "name": "m", "sequence_length": 16, "layers": [layer],
         "timings": rows}
    )  # fmt: skip
    assert noise_warnings(pool, model) == ["block on desk: spread 31 %, measure again on an idle device"]


def test_sample_counts_double_up_to_the_batch() -> None:
    assert sample_counts(1) == (1,)
    assert sample_counts(6) == (1, 2, 4, 6)
    assert sample_counts(64) == (1, 2, 4, 8)


def test_shard_parts_are_proper() -> None:
    assert shard_parts(2) == (1,)
    assert shard_parts(8) == (1, 4, 7)
    assert shard_parts(3) == (1, 2)


def test_a_rehearsed_link_is_as_slow_as_its_slower_end() -> None:
    slow, slower = Emulation(bandwidth=2e6, latency=0.001), Emulation(bandwidth=1e6, latency=0.002)
    assert slow.link_to(slower) == (pytest.approx(0.003), 1e6)
    assert slow.link_to(Emulation()) == (pytest.approx(0.001), 2e6)
    assert Emulation().link_to(Emulation()) == (0, None)


def test_memory_is_between_this_process_and_the_machine() -> None:
    cpu = torch.device("cpu")
    assert 50e6 < runtime_bytes(cpu) <= resident_bytes() + 1e6
    assert runtime_bytes(cpu) < usable_bytes(cpu) <= psutil.virtual_memory().total + resident_bytes()

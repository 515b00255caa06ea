"""What holds when peers talk, fall silent, babble or die. Each world that breaks lives in its own subprocess."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from colledge.data.batch import Batch
from colledge.errors import ColledgeError
from colledge.models import HuggingFaceCausalLM
from colledge.parallel import Emulation, Engine, EngineSettings, Message, OptimizerSettings
from colledge.parallel.clock import Clock
from colledge.parallel.engine import command
from colledge.parallel.wire import Pace
from colledge.plan import Plan
from tests import forked
from tests.multiproc.faulty_worker import SINK_TAG, FaultyWorkers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool)
SHAPES = ((3, 5), (1,), (), (0,), (2, 0, 3))


# -- scenarios: run in a subprocess, print what was seen -----------------------------------------------------------


def _ask(world: FaultyWorkers, device: str, **fields: Any) -> Message:
    rank = world.ranks[device]
    return command(world.wire, {rank: Message(fields)}, fields["command"], world.ranks)[device]


def _fault(act: Callable[[], object]) -> dict[str, Any]:
    """Return the error of an act, how long it took, and its exit code."""
    began_s = time.perf_counter()
    try:
        act()
    except ColledgeError as fault:
        seconds = time.perf_counter() - began_s
        return {
            "kind": type(fault).__name__,
            "text": str(fault),
            "exit_code": fault.exit_code,
            "seconds": seconds,
        }
    raise AssertionError("no error")


def _finish(world: FaultyWorkers, **seen: Any) -> dict[str, Any]:
    """Return what was seen, and whether the workers ended by themselves while this process still lives."""
    deadline_s = time.perf_counter() + 15
    while any(p.is_alive() for p in world.processes) and time.perf_counter() < deadline_s:
        time.sleep(0.05)
    return {
        **seen,
        "codes": [process.exitcode for process in world.processes],
        "pids": [process.pid for process in world.processes],
    }


def echo_and_pace() -> dict[str, Any]:
    """Messages there and back, paced sends, and at last a worker that talks nonsense."""
    world = FaultyWorkers(2)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            values = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator)
            tensors[f"{dtype}{shape}"] = values.to(dtype)
    tensors["strided"] = torch.arange(12.0).view(3, 4).t()
    content = {"text": "äöü ∑", "number": 0.1, "nothing": None, "list": [1, [2]], "flag": True}
    message = Message({"command": "echo", "content": content}, tensors)
    answer = command(world.wire, {1: message}, "echo", world.ranks)["d0"]
    wrong = [
        name
        for name, tensor in tensors.items()
        if answer.tensors[name].dtype != tensor.dtype or not torch.equal(answer.tensors[name], tensor)
    ]
    bare = command(world.wire, {2: Message({"command": "echo", "content": 1})}, "echo", world.ranks)["d1"]

    paced = []
    for bandwidth, latency_s, num_bytes in ((10e6, 0.0, 4_000_000), (1e6, 0.1, 300_000)):
        world.wire.pace({1: Pace(latency_s, bandwidth)})
        payload = torch.ones(num_bytes, dtype=torch.uint8)
        seconds, arrived = [], True
        for _ in range(4):  # another process may hold one up
            world.wire.send_message(1, Message({"command": "sink", "num_bytes": num_bytes}))
            began_s = time.perf_counter()
            world.wire.send(payload, 1, SINK_TAG).wait("a paced send")
            total = world.wire.receive_message(1, "sink").fields["total"]
            seconds.append(time.perf_counter() - began_s)
            arrived &= total == num_bytes
        wanted = latency_s + num_bytes / bandwidth
        paced.append({"seconds": min(seconds), "wanted": wanted, "arrived": arrived})
    world.wire.pace({})
    babble = _fault(lambda: _ask(world, "d0", command="babble", header=[42, 10, 0]))
    too_long = _fault(lambda: _ask(world, "d1", command="babble", header=[0x636F6C6C65646765, 2**40, 0]))
    for process in world.processes:
        process.kill()
    return _finish(
        world,
        wrong=wrong,
        same_content=answer.fields["echo"] == content,
        bare=[bare.fields["echo"], len(bare.tensors)],
        paced=paced,
        babble=babble,
        too_long=too_long,
    )


def silence() -> dict[str, Any]:
    """A worker that is busy with something else for longer than its peer will wait."""
    world = FaultyWorkers(1)
    world.wire.names[1] = "device 'd0'"
    world.wire.send_message(1, Message({"command": "sleep", "seconds": 4.0}))
    fault = _fault(lambda: world.wire.receive_message(1, "the figures of step 7", 1.0))
    return _finish(world, fault=fault)


def _pipeline(world: FaultyWorkers, slowdown: float) -> tuple[Engine, Batch]:
    """Return an engine with one stage a worker, and a batch whose step takes some seconds."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    weights = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    count = len(world.ranks)
    cuts = [0, *range(2, count + 1), 6]
    plan = Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": 6,
            "global_batch_size": 8,
            "microbatch_size": 1,
            "stages": [
                {
                    "layers": [cuts[i], cuts[i + 1]],
                    "replicas": [{"samples": 1, "shards": [{"device": f"d{i}"}]}],
                }
                for i in range(count)
            ],
        }
    )
    chosen = EngineSettings(
        OptimizerSettings(), emulations={device: Emulation(slowdown=slowdown) for device in world.ranks}
    )
    engine = Engine(plan, HuggingFaceCausalLM(config.to_dict()), weights, chosen, world.ranks, world.wire)
    ids = torch.randint(0, 32, (8, 32))
    return engine, Batch({"input_ids": ids}, {"labels": ids})


def _strike(victim: str, signal_number: int, timeout_s: float) -> dict[str, Any]:
    """Send a signal to a worker in the middle of a step."""
    world = FaultyWorkers(3)
    engine, batch = _pipeline(world, slowdown=1.0)
    engine.train_step(batch)
    world.wire.timeout_s = timeout_s
    engine.close()
    engine, batch = _pipeline(world, slowdown=60.0)
    process = world.processes[world.ranks[victim] - 1]
    struck_s = [0.0]

    def strike() -> None:
        struck_s[0] = time.perf_counter()
        os.kill(process.pid or 0, signal_number)

    timer = threading.Timer(0.5, strike)
    timer.start()
    fault = _fault(lambda: engine.train_step(batch))
    seconds = time.perf_counter() - struck_s[0]
    timer.join()
    if signal_number == signal.SIGSTOP:
        process.kill()
    return _finish(world, fault=fault, seconds=seconds)


def failing() -> dict[str, Any]:
    """A worker whose own code raises in the middle of a step."""
    world = FaultyWorkers(3)
    engine, batch = _pipeline(world, slowdown=1.0)
    _ask(world, "d1", command="inject", fault="fail")
    return _finish(world, fault=_fault(lambda: engine.train_step(batch)))


def abandon() -> dict[str, Any]:
    """A coordinator that dies in the middle of a step."""
    world = FaultyWorkers(3)
    engine, batch = _pipeline(world, slowdown=60.0)
    print(json.dumps({"pids": [process.pid for process in world.processes]}), flush=True)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    engine.train_step(batch)
    raise AssertionError("the step ended before the coordinator was killed")


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "echo_and_pace": echo_and_pace,
    "silence": silence,
    "kill d1": lambda: _strike("d1", signal.SIGKILL, 60.0),
    "kill d2": lambda: _strike("d2", signal.SIGKILL, 60.0),
    "freeze d0": lambda: _strike("d0", signal.SIGSTOP, 6.0),
    "freeze d2": lambda: _strike("d2", signal.SIGSTOP, 6.0),
    "failing": failing,
    "abandon": abandon,
}


# -- tests ---------------------------------------------------------------------------------------------------------


def _act(scenario: str) -> None:
    print(json.dumps(SCENARIOS[scenario]()), flush=True)
    os._exit(0)  # the world is broken on purpose: there is nothing to close in order


def _run(scenario: str, code: int = 0) -> dict[str, Any]:
    """Run a scenario in its own process; afterwards no process of it may be left."""
    finished = forked.run(_act, scenario, timeout_s=90)
    assert finished.returncode == code, finished.stderr
    seen: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    _, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in seen["pids"] if psutil.pid_exists(pid)], timeout=10
    )
    assert not alive, f"orphans: {alive}"
    return seen


@pytest.fixture(scope="module")
def peaceful() -> dict[str, Any]:
    return _run("echo_and_pace")


def test_messages_arrive_as_they_were_sent(peaceful: dict[str, Any]) -> None:
    assert peaceful["wrong"] == []
    assert peaceful["same_content"]
    assert peaceful["bare"] == [1, 0]


def test_paced_sends_take_as_long_as_their_link(peaceful: dict[str, Any]) -> None:
    for send in peaceful["paced"]:
        assert send["arrived"]
        assert send["seconds"] == pytest.approx(send["wanted"], rel=0.2)


@pytest.mark.parametrize(("case", "device"), [("babble", "d0"), ("too_long", "d1")])
def test_a_header_of_something_else_is_refused(peaceful: dict[str, Any], case: str, device: str) -> None:
    fault = peaceful[case]
    assert fault["kind"] == "DeviceError"
    assert fault["exit_code"] == 4
    assert "no colledge message" in fault["text"]
    assert "rank" in fault["text"] or device in fault["text"]


def test_a_silent_peer_is_named_at_the_deadline() -> None:
    seen = _run("silence")
    fault = seen["fault"]
    assert fault["kind"] == "DeadlineError"
    assert "device 'd0'" in fault["text"]
    assert "the figures of step 7" in fault["text"]
    assert 0.9 < fault["seconds"] < 2.5


@pytest.mark.parametrize("victim", ["d1", "d2"])
def test_a_killed_device_is_named_within_seconds_and_the_others_end(victim: str) -> None:
    seen = _run(f"kill {victim}")
    assert f"device '{victim}'" in seen["fault"]["text"]
    assert "step 1" in seen["fault"]["text"]
    assert seen["fault"]["exit_code"] == 4
    assert seen["seconds"] < 5
    assert seen["codes"] == [-signal.SIGKILL if f"d{i}" == victim else 4 for i in range(3)]


@pytest.mark.parametrize("victim", ["d0", "d2"])
def test_a_frozen_device_is_named_after_the_deadline_and_the_others_end(victim: str) -> None:
    seen = _run(f"freeze {victim}")
    assert seen["fault"]["kind"] == "DeadlineError"
    assert f"device '{victim}'" in seen["fault"]["text"]
    assert "step 1" in seen["fault"]["text"]
    assert seen["seconds"] < 20
    assert None not in seen["codes"]


def test_a_fault_of_a_device_reaches_the_user_by_name() -> None:
    seen = _run("failing")
    assert "device 'd1'" in seen["fault"]["text"]
    assert "injected" in seen["fault"]["text"]
    assert "\n" not in seen["fault"]["text"]
    assert seen["fault"]["seconds"] < 5
    assert seen["codes"] == [4, 4, 4]


def test_workers_end_when_their_coordinator_dies() -> None:
    _run("abandon", code=-signal.SIGKILL)


def _burn(cpu_s: float) -> None:
    begin_s = time.thread_time()
    while time.thread_time() - begin_s < cpu_s:
        pass


def test_an_emulated_device_computes_three_times_as_long() -> None:
    ratios = []
    for _ in range(40):  # another process may hold this one up: the best counts
        clock = Clock(slowdown=3.0)
        clock.begin_compute()
        _burn(0.005)
        clock.end_compute()
        ratios.append(clock.compute_s / 0.005)
    assert 2.95 < min(ratios) < 3.3


def test_a_real_device_is_not_slowed_down() -> None:
    endings_s = []
    for _ in range(40):
        clock = Clock()
        before_s = time.perf_counter()
        clock.begin_compute()
        begun_s = time.perf_counter()
        _burn(0.005)
        burnt_s = time.perf_counter()
        clock.end_compute()
        after_s = time.perf_counter()
        assert burnt_s - begun_s <= clock.compute_s <= after_s - before_s
        endings_s.append(after_s - burnt_s)
    assert min(endings_s) < 0.0005  # nothing is slept: an emulated device ends 5 ms later and more

"""The generator says what the policy says, draws the same tokens wherever a prompt lands, and outlives its workers."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray import cloudpickle
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessorList, MinPLogitsWarper, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from actors.fatal_prompts import FatalPrompts
from actors.generator import Generator
from actors.generator_worker import Answer, Completion, GeneratorEngine, GeneratorWorker, Key, Order, Request, sampling_seed
from actors.group import OutOfRestarts
from actors.placement import Cluster
from actors.rank_host import Rank
from actors.transformers_engine import filtered_logprobs
from actors.weights import Probe, Publication, WeightsError, probe_tokens, publish
from minigpt_ray.config import GeneratorConfig, GeneratorPlacement, PlacementConfig, SamplingConfig
from minigpt_ray.models import TokenLogprobs, export, load_causal
from minigpt_ray.rl.experience import Prompt, Rollout, RolloutBatch
from minigpt_ray.tokenizer import load_tokenizer

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers' processes cannot import a test
pytestmark = pytest.mark.ray

VLLM = GeneratorConfig(kv_cache_mib=64, max_num_seqs=64)
TRANSFORMERS = GeneratorConfig(backend="transformers", restart_limit=2)
LIMIT = 512
TOLERANCE = 1e-3
SAMPLED, GREEDY = SamplingConfig(max_tokens=24, n=2), SamplingConfig(max_tokens=24, temperature=0)


def prompt(serial: int) -> Prompt:
    """Byte-like tokens, 3 to 12 of them."""
    random = np.random.default_rng(serial)
    ids = random.integers(4, 260, random.integers(3, 13)).astype(np.int32)
    return Prompt(serial, ({"role": "user", "content": "?"},), ids, "source", None)


PROMPTS = [prompt(serial) for serial in range(12)]


def policy_logprobs(model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float = 1.0) -> Tensor:
    """What the policy says about the response tokens, as the learner computes it."""
    batch = RolloutBatch.of(rollouts)
    with torch.no_grad():
        return TokenLogprobs(model)(batch.token_ids, batch.response_mask, temperature)[0]


def gap(model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float = 1.0) -> float:
    """Largest difference in nats between generator and policy."""
    return float((policy_logprobs(model, rollouts, temperature) - RolloutBatch.of(rollouts).generator_logprobs).abs().max())


def tokens(rollouts: Sequence[Rollout]) -> list[list[int]]:
    return [r.token_ids.tolist() for r in rollouts]


def updated(path: Path, change: float) -> PreTrainedModel:
    """The model at `path` after an update: every weight moved, the tied embedding among them."""
    model = load_causal(str(path), "float32").eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += change * torch.randn_like(parameter)
    return model


def published(model: PreTrainedModel, version: int) -> Publication:
    """As the policy publishes."""
    ids = torch.tensor([probe_tokens(model.config.vocab_size)])
    with torch.no_grad():
        logprobs = TokenLogprobs(model)(ids, torch.arange(ids.shape[1])[None] > 0)[0][0, 1:]
    return publish(version, model.named_parameters(), 1 << 16, Probe(tuple(ids[0].tolist()), tuple(logprobs.tolist())))


@pytest.fixture(scope="module")
def model(nano: Path) -> PreTrainedModel:
    """The checkpoint as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(nano).eval()


# ---------------------------------------------------------------------------------------------- a worker that dies


@pytest.fixture
def mortal(ray_cluster: None, nano: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Generator]:
    """Two quickly started workers, which may be replaced twice, once for each death; gone before the module's other workers need the name of the role."""
    monkeypatch.setattr("actors.pool.INCIDENT_SECONDS", 0.0)
    placement = PlacementConfig(generator=GeneratorPlacement(workers=2), hang_after_s=8)
    with Cluster(placement, {"generator": placement.generator}) as cluster:
        generator = Generator(cluster, str(nano), TRANSFORMERS, LIMIT, 1, seed=3, probe_tolerance=TOLERANCE)
        generator.ready()
        yield generator


def kill(generator: Generator, index: int) -> None:
    """SIGKILL to the process of a worker."""
    os.kill(pids(generator)[index], signal.SIGKILL)


def pids(generator: Generator) -> list[int]:
    return ray.get([host.__ray_call__.remote(lambda _: os.getpid()) for host in generator.hosts])


def test_a_worker_that_is_killed_or_hangs_is_replaced_and_the_tokens_are_the_same(mortal: Generator, nano: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a generation; the new one is brought to the published weights first."""
    new = updated(nano, change=0.02)
    mortal.receive(published(new, version=5))
    sampling = replace_sampling(SAMPLED, max_tokens=200)
    expected = mortal.generate(PROMPTS, sampling)
    first, second = pids(mortal)
    timer = threading.Timer(0.3, os.kill, (second, signal.SIGKILL))
    timer.start()
    start = time.perf_counter()
    rollouts = mortal.generate(PROMPTS, sampling)
    assert time.perf_counter() - start > 0.5
    timer.join()
    mortal.ready()  # what the dead worker held went to the other one, and its successor may still be on its way
    assert tokens(rollouts) == tokens(expected)
    assert gap(new, rollouts) < TOLERANCE
    assert all((r.weight_versions == 5).all() for r in rollouts)
    assert pids(mortal)[0] == first and pids(mortal)[1] != second
    assert mortal.usage_metrics(1.0)["restarts/generator"] == 1

    stopped = pids(mortal)[1]
    timer = threading.Timer(0.3, os.kill, (stopped, signal.SIGSTOP))
    timer.start()
    assert tokens(mortal.generate(PROMPTS, sampling)) == tokens(expected)
    timer.join()
    start = time.perf_counter()
    mortal.receive(published(new, version=6))  # nobody waits for the one that hangs
    assert [worker.version for worker in mortal.workers] == [6, -1] and time.perf_counter() - start < 8
    while mortal.restarts == 1:  # also when publications come sooner than it may take to load one
        assert tokens(mortal.generate(PROMPTS, sampling)) == tokens(expected)
        mortal.receive(published(new, version=mortal.version + 1))
    mortal.ready()
    assert stopped not in pids(mortal) and mortal.usage_metrics(1.0)["restarts/generator"] == 2
    assert re.search(rf"generator worker \d \(process {stopped} on [\d.]+, stopped\) has been in GeneratorWorker\.(work|receive) for 8 s", caplog.text)

    kill(mortal, 0)  # no restart is left: the other one answers alone
    assert tokens(mortal.generate(PROMPTS, sampling)) == tokens(expected)
    assert mortal.size == len(mortal.workers) == 1 and mortal.restarts == 2
    assert re.search(
        r"generator worker \d \(process \d+ on [\d.]+\) died, and generator\.restart_limit is used up until the next checkpoint; the job goes on with 1",
        caplog.text,
    )
    kill(mortal, 0)
    with pytest.raises(OutOfRestarts, match=r"processes of generator died more often than generator\.restart_limit allows"):
        mortal.generate(PROMPTS, sampling)


def spoil(generator: Generator, index: int, change: Callable[[GeneratorEngine], None]) -> int:
    """Do something to a worker's engine, in its process, whose id is returned."""
    ray.get(generator.hosts[index].__ray_call__.remote(lambda host: change(host.roles["generator"].engine)))
    return pids(generator)[index]


def fails(engine: GeneratorEngine) -> None:
    def step() -> list[tuple[Key, Completion]]:
        raise RuntimeError("an illegal memory access was encountered")

    subprocess.Popen(["sleep", "600"])  # a process that the engine has started
    engine.step = step


def takes_steps_that_lead_nowhere(engine: GeneratorEngine) -> None:
    engine.step = lambda: time.sleep(0.05) or []


def test_an_engine_that_fails_ends_its_process_and_one_that_answers_nothing_is_replaced(
    mortal: Generator, nano: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second worker answers every call, and no prompt: a wedged one. What it holds, the first one answers."""
    mortal.receive(published(updated(nano, change=0.02), version=5))
    expected = mortal.generate(PROMPTS, SAMPLED)
    failed, number = spoil(mortal, 1, fails), mortal.workers[1].number
    children = psutil.Process(failed).children()
    assert tokens(mortal.generate(PROMPTS, SAMPLED)) == tokens(expected)
    mortal.ready()
    assert mortal.restarts == 1 and not psutil.pid_exists(failed) and children
    assert not any(child.is_running() and child.name() == "sleep" for child in children)
    assert re.search(rf"generator worker {number} \(process {failed} on [\d.]+\) died; a new one takes its place", caplog.text)

    mortal.receive(published(updated(nano, change=0.02), version=6))
    wedged, number = spoil(mortal, 1, takes_steps_that_lead_nowhere), mortal.workers[1].number
    while mortal.restarts == 1:
        assert tokens(mortal.generate(PROMPTS, SAMPLED)) == tokens(expected)
    assert re.search(rf"generator worker {number} \(process {wedged} on [\d.]+, \w+\) has been in GeneratorWorker\.work for 8 s", caplog.text)


class DyingOf(GeneratorWorker):
    """A worker that nothing survives of when it is asked for an answer to a prompt of FATAL."""

    def work(self, orders: Sequence[Order], *rest: Any) -> list[tuple[int, list[Answer]]]:
        if any(request.token_ids.tolist() in FATAL for order in orders for request in order.requests):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().work(orders, *rest)


FATAL = [PROMPTS[4].token_ids.tolist(), [5, 6, 7]]


def test_a_prompt_of_which_workers_die_is_given_up_and_costs_no_more_restarts_than_one_death_does(
    ray_cluster: None, nano: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.generator.GeneratorWorker", DyingOf)
    placement = PlacementConfig(generator=GeneratorPlacement(workers=2))
    with Cluster(placement, {"generator": placement.generator}) as cluster:
        generator = Generator(cluster, str(nano), TRANSFORMERS.model_copy(update={"restart_limit": 1, "fatal_prompt_limit": 1}), LIMIT, 1, seed=3)
        generator.ready()
        generator.use_checkpoint()
        sane = [prompt for prompt in PROMPTS if prompt.serial != 4]
        expected = generator.generate(sane, SAMPLED)
        rollouts = generator.generate(PROMPTS, SAMPLED)
        assert [r.prompt.serial for r in rollouts if not r.valid] == [4, 4] and {r.finish_reason for r in rollouts if not r.valid} == {"failed"}
        assert tokens([r for r in rollouts if r.valid]) == tokens(expected)
        assert "die of a prompt of source, 10 tokens, that begins with '?'; it gets no answers from now on" in caplog.text
        assert len(RolloutBatch.of(rollouts)) == 24 and not RolloutBatch.of(rollouts).response_mask[8:10].any()
        deaths = generator.restarts
        assert 3 <= deaths <= 4 and generator.size == 2
        assert tokens(generator.generate(PROMPTS, SAMPLED)) == tokens(rollouts) and generator.restarts == deaths  # nobody is asked again
        with pytest.raises(FatalPrompts, match=r"begins with '\?'; that is one more than generator\.fatal_prompt_limit=1 allows between two checkpoints"):
            generator.generate([replace(PROMPTS[0], token_ids=np.array([5, 6, 7], np.int32))], SAMPLED)


# ------------------------------------------------------------------------------------------ two workers with vLLM


@pytest.fixture(scope="module")
def two_workers(ray_cluster: None, nano: Path) -> Iterator[Generator]:
    """Two vLLM workers, as PPO starts them."""
    placement = PlacementConfig(generator=GeneratorPlacement(workers=2))
    with Cluster(placement, {"generator": placement.generator}) as cluster:
        generator = Generator(cluster, str(nano), VLLM, LIMIT, 1, seed=3, probe_tolerance=TOLERANCE)
        generator.ready()
        yield generator


@pytest.fixture
def generator(two_workers: Generator) -> Generator:
    """With the weights of the checkpoint that the engines were built from, whatever the test before has published."""
    if two_workers.version > 0:
        two_workers.receive(published(load_causal(two_workers._args[0], "float32").eval(), version=0))
    else:
        two_workers.use_checkpoint()
    return two_workers


# ------------------------------------------------------------------------------- vLLM against the policy's own view


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_loads_an_export_as_it_is_and_its_logprobs_are_the_policys(generator: Generator, model: PreTrainedModel, temperature: float) -> None:
    rollouts = generator.generate(PROMPTS, replace_sampling(SAMPLED, temperature=temperature))
    assert gap(model, rollouts, temperature) < TOLERANCE
    assert gap(model, rollouts, temperature + 0.2) > 0.05  # so the comparison can tell


def replace_sampling(sampling: SamplingConfig, **changes: object) -> SamplingConfig:
    return sampling.model_copy(update=changes)


def test_greedy_is_the_argmax_of_the_model(generator: Generator, model: PreTrainedModel) -> None:
    for rollout in generator.generate(PROMPTS[:4], GREEDY):
        ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids])).long()
        with torch.no_grad():
            best = model(ids[None]).logits[0, :-1].argmax(-1)[-len(rollout.token_ids) :]
        assert rollout.token_ids.tolist() == best.tolist()


def test_a_llama_export_loads_as_it_is_and_agrees(two_workers: Generator, llama: Path) -> None:
    """In the process of a worker, which has vLLM loaded already."""
    args = (str(llama), VLLM, 64, 1, 3, TOLERANCE)
    host = two_workers.hosts[0]
    ray.get(host.build.remote("llama", GeneratorWorker, *args))
    ray.get(host.call.remote("llama", GeneratorWorker.load_checkpoint, (0, str(llama))))
    orders = [Order(i, (Request(p.token_ids, p.serial),)) for i, p in enumerate(PROMPTS)]
    one_each = replace_sampling(SAMPLED, n=1)
    answers = dict(ray.get(host.call.remote("llama", GeneratorWorker.work, (orders, [], one_each, 0))).value)
    while len(answers) < len(orders):
        answers |= dict(ray.get(host.call.remote("llama", GeneratorWorker.work, ([], [], one_each, 0))).value)
    rollouts = [rollout_of(p, answers[i][0].completion.token_ids, answers[i][0].completion.logprobs) for i, p in enumerate(PROMPTS)]
    assert gap(AutoModelForCausalLM.from_pretrained(llama).eval(), rollouts) < TOLERANCE


def rollout_of(prompt: Prompt, token_ids: np.ndarray, logprobs: np.ndarray) -> Rollout:
    size = len(token_ids)
    return Rollout(prompt, 0, token_ids, np.ones(size, bool), logprobs, np.zeros(size, np.int32), "", "stop")


# --------------------------------------------------------------------------------------------- order, seeds, ends


def test_samples_are_grouped_by_prompt_in_order_and_differ(generator: Generator) -> None:
    rollouts = generator.generate(PROMPTS[:5], replace_sampling(SAMPLED, n=3))
    assert [(r.group, r.sample) for r in rollouts] == [(p.serial, sample) for p in PROMPTS[:5] for sample in range(3)]
    assert all(r.prompt is PROMPTS[r.group] for r in rollouts)
    assert len({str(t) for t in tokens(rollouts)}) == 15
    assert all(r.valid and r.model_mask.all() and len(r.logprobs) == len(r.token_ids) for r in rollouts)


def test_a_prompt_gets_the_same_tokens_alone_in_a_batch_and_from_either_worker(generator: Generator) -> None:
    together = generator.generate(PROMPTS, SAMPLED)
    turned = generator.generate(PROMPTS[::-1], SAMPLED)  # each prompt lands at the other worker
    assert {(r.group, r.sample): r.token_ids.tolist() for r in turned} == {(r.group, r.sample): r.token_ids.tolist() for r in together}
    alone = [rollout for prompt in PROMPTS[:3] for rollout in generator.generate([prompt], SAMPLED)]
    assert tokens(alone) == tokens(together[:6])


def test_chunks_come_when_they_are_whole_and_hold_what_one_call_gives(generator: Generator) -> None:
    """Chunks are cut by the order of prompts, the last one is shorter, and one may overtake another."""
    chunks = list(generator.stream(PROMPTS, SAMPLED, chunk=5))
    assert sorted([r.group for r in chunk] for chunk in chunks) == [[s for s in part for _ in range(2)] for part in (range(5), range(5, 10), range(10, 12))]
    together = {(r.group, r.sample): r.token_ids.tolist() for r in generator.generate(PROMPTS, SAMPLED)}
    assert {(r.group, r.sample): r.token_ids.tolist() for chunk in chunks for r in chunk} == together


def test_a_short_answer_is_handed_on_while_long_ones_are_still_written(generator: Generator) -> None:
    """The stop string ends the first prompt's greedy answer at once; the others go on to the limit."""
    first = generator.generate(PROMPTS[:1], GREEDY)[0]
    alone = replace_sampling(GREEDY, max_tokens=1)
    stop = load_tokenizer(generator._args[0]).decode(generator.generate(PROMPTS[:1], alone)[0].token_ids)
    others = [p for p in PROMPTS[1:] if stop not in generator.generate([p], replace_sampling(GREEDY, max_tokens=100))[0].text]
    assert stop and first.text.startswith(stop) and others
    arrivals = [
        (chunk[0].group, time.perf_counter())
        for chunk in generator.stream([PROMPTS[0], *others[:1]], replace_sampling(GREEDY, max_tokens=100, stop=(stop,)), chunk=1)
    ]
    assert arrivals[0][0] == 0 and arrivals[1][1] - arrivals[0][1] > 0.05


def test_seeds_depend_on_run_prompt_sample_and_turn_alone() -> None:
    seeds = {sampling_seed(*key) for key in np.ndindex(3, 20, 4, 2)}
    assert len(seeds) == 3 * 20 * 4 * 2
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(1, 2, 3) == sampling_seed(1, 2, 3, turn=0) == 1911094848


def test_the_end_token_is_part_of_the_response_and_what_has_none_is_truncated(generator: Generator, nano: Path) -> None:
    end = load_tokenizer(nano).eos_token_id
    rollouts = generator.generate(PROMPTS, replace_sampling(SAMPLED, n=6, max_tokens=64))
    ended = [r for r in rollouts if not r.truncated]
    assert 0 < len(ended) < len(rollouts)
    for rollout in rollouts:
        assert (rollout.token_ids[-1] == end) == (rollout.finish_reason == "stop") == (not rollout.truncated)
        assert end not in rollout.token_ids[:-1]
        assert len(rollout.token_ids) == 64 or not rollout.truncated
        assert "<|im_end|>" not in rollout.text


def test_text_is_what_the_tokens_decode_to(generator: Generator, nano: Path) -> None:
    tokenizer = load_tokenizer(nano)
    for rollout in generator.generate(PROMPTS[:3], SAMPLED):
        assert rollout.text == tokenizer.decode(rollout.token_ids, skip_special_tokens=True)


def stop_at(rollouts: Sequence[Rollout], nano: Path) -> tuple[int, str]:
    """A plain character that a response has behind its first tokens: (which response, the character)."""
    tokenizer = load_tokenizer(nano)
    for row, rollout in enumerate(rollouts):
        pieces = [tokenizer.decode([token]) for token in rollout.token_ids.tolist()]
        for position in range(3, len(pieces)):
            if pieces[position].isascii() and pieces[position].isalnum() and pieces[position] not in pieces[:position]:
                return row, pieces[position]
    raise AssertionError("no response has a plain character")


def assert_a_stop_string_ends_a_response(generate: Callable[[SamplingConfig], list[Rollout]], nano: Path) -> None:
    """A response ends with the stop string, and is up to there what it was without one."""
    free = generate(SAMPLED)
    row, character = stop_at(free, nano)
    stopped = generate(replace_sampling(SAMPLED, stop=(character,)))[row]
    assert stopped.finish_reason == "stop" and not stopped.truncated
    assert stopped.text.endswith(character)
    size = len(stopped.token_ids)
    assert size < len(free[row].token_ids)
    assert stopped.token_ids.tolist() == free[row].token_ids[:size].tolist()


def test_a_stop_string_ends_a_response(generator: Generator, nano: Path) -> None:
    assert_a_stop_string_ends_a_response(lambda sampling: generator.generate(PROMPTS, sampling), nano)


# ------------------------------------------------------------------------------------------------- new weights


def test_after_an_update_is_published_the_logprobs_are_the_new_policys(generator: Generator, model: PreTrainedModel, nano: Path) -> None:
    """Embedding, and with it the tied output head, included: 30 times the tolerance apart before."""
    new = updated(nano, change=0.02)
    assert gap(new, generator.generate(PROMPTS, SAMPLED)) > 30 * TOLERANCE
    generator.receive(published(new, version=1))
    rollouts = generator.generate(PROMPTS, SAMPLED)
    assert gap(new, rollouts) < TOLERANCE
    assert gap(model, rollouts) > 30 * TOLERANCE
    assert all((r.weight_versions == 1).all() for r in rollouts)
    assert [r.version for r in generator.received] == [1, 1] and max(r.probe_gap for r in generator.received) < TOLERANCE
    metrics = generator.metrics()
    assert metrics["weights/version"] == 1 and metrics["weights/publish_bytes"] == sum(p.numel() * 4 for p in new.parameters())


def test_engines_load_another_checkpoint_that_differs_in_its_weights_alone(
    generator: Generator, model: PreTrainedModel, nano: Path, llama: Path, tmp_path: Path
) -> None:
    """As an evaluation of several models does."""
    new = updated(nano, change=0.02)
    export(new, load_tokenizer(nano), tmp_path)
    assert generator.can_use(str(tmp_path)) and not generator.can_use(str(llama))
    generator.use_checkpoint(1, str(tmp_path))
    rollouts = generator.generate(PROMPTS, SAMPLED)
    assert gap(new, rollouts) < TOLERANCE and all((r.weight_versions == 1).all() for r in rollouts)
    generator.use_checkpoint(2, str(nano))
    assert gap(model, generator.generate(PROMPTS, SAMPLED)) < TOLERANCE


def test_a_tied_head_that_stays_stale_in_vllm_is_found_by_the_probe(generator: Generator, nano: Path) -> None:
    new = published(updated(nano, change=0.02), version=2)
    stale = replace(new, manifest=tuple(spec for spec in new.manifest if spec.name != "model.embed_tokens.weight"))
    with pytest.raises(WeightsError, match=r"after loading weights version 2 .* a tensor was not applied"):
        generator.receive(stale)
    with pytest.raises(RuntimeError, match="has proved weights version -1 and was asked to generate with 2"):
        generator.call(GeneratorWorker.work, [], [], SAMPLED, 2).result()
    with pytest.raises(WeightsError, match="a tensor was not applied"):
        generator.generate(PROMPTS[:2], SAMPLED)
    while generator._loading:  # nor can the other worker prove it
        with suppress(WeightsError):
            generator._see_loads()
    generator.receive(new)
    assert len(generator.generate(PROMPTS[:2], SAMPLED)) == 4


def test_vllm_with_weights_that_are_not_numbers_is_found_by_the_probe(generator: Generator, nano: Path, model: PreTrainedModel) -> None:
    with pytest.raises(WeightsError, match="differ by nan nats"):
        generator.receive(published(updated(nano, change=float("nan")), version=3))
    generator.receive(published(model, version=4))
    assert gap(model, generator.generate(PROMPTS, SAMPLED)) < TOLERANCE


# ------------------------------------------------------------------------------------------ without vLLM: same contract


@pytest.fixture(scope="module")
def plain(nano: Path) -> GeneratorWorker:
    """A worker on transformers alone, in this process; batches of 5."""
    worker = GeneratorWorker(Rank(0, 1, "cpu"), str(nano), GeneratorConfig(backend="transformers", max_num_seqs=5), LIMIT, 1, 3, TOLERANCE)
    worker.load_checkpoint(0, str(nano))
    return worker


def completed(worker: GeneratorWorker, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Rollout]:
    sampling = replace_sampling(sampling, n=1)
    orders = [Order(i, (Request(p.token_ids, sampling_seed(3, p.serial, 0)),)) for i, p in enumerate(prompts)]
    answers = dict(worker.work(orders, [], sampling, 0))
    while len(answers) < len(prompts):
        answers |= dict(worker.work([], [], sampling, 0))
    found = [(p, answers[i][0].completion, answers[i][0].text) for i, p in enumerate(prompts)]
    return [replace(rollout_of(p, c.token_ids, c.logprobs), text=text, finish_reason=c.finish_reason) for p, c, text in found]


def test_transformers_writes_greedily_what_vllm_writes(plain: GeneratorWorker, generator: Generator) -> None:
    mine, theirs = completed(plain, PROMPTS, GREEDY), generator.generate(PROMPTS, GREEDY)
    assert tokens(mine) == tokens(theirs)
    assert [(r.text, r.finish_reason) for r in mine] == [(r.text, r.finish_reason) for r in theirs]
    assert np.abs(np.concatenate([a.logprobs - b.logprobs for a, b in zip(mine, theirs, strict=True)])).max() < TOLERANCE


def test_transformers_stops_at_a_stop_string(plain: GeneratorWorker, nano: Path) -> None:
    assert_a_stop_string_ends_a_response(lambda sampling: completed(plain, PROMPTS, sampling), nano)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_transformers_samples_by_seed_with_the_policys_logprobs(plain: GeneratorWorker, model: PreTrainedModel, temperature: float) -> None:
    sampling = replace_sampling(SAMPLED, temperature=temperature)
    rollouts = completed(plain, PROMPTS, sampling)
    assert gap(model, rollouts, temperature) < 1e-4
    assert tokens([completed(plain, [p], sampling)[0] for p in PROMPTS[:3]]) == tokens(rollouts[:3])
    assert len({str(t) for t in tokens(rollouts)}) == len(PROMPTS)


def test_transformers_includes_the_end_token(plain: GeneratorWorker, nano: Path) -> None:
    end = load_tokenizer(nano).eos_token_id
    rollouts = completed(plain, [replace(p, serial=1000 + i) for i, p in enumerate(PROMPTS * 4)], replace_sampling(SAMPLED, max_tokens=64))
    for rollout in rollouts:
        assert (rollout.token_ids[-1] == end) == (not rollout.truncated)
        assert end not in rollout.token_ids[:-1]
    assert 0 < sum(r.truncated for r in rollouts) < len(rollouts)


HALVES = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingConfig(), [0.5, 0.25, 0.15, 0.1]),
        (SamplingConfig(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (SamplingConfig(temperature=0), [0.5, 0.25, 0.15, 0.1]),
        (SamplingConfig(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(top_k=9), [0.5, 0.25, 0.15, 0.1]),
        (SamplingConfig(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(top_p=0.4), [1, 0, 0, 0]),
        (SamplingConfig(min_p=0.4), [2 / 3, 1 / 3, 0, 0]),
        (SamplingConfig(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_filters_by_hand(sampling: SamplingConfig, expected: list[float]) -> None:
    assert torch.allclose(filtered_logprobs(HALVES, sampling).exp(), torch.tensor([expected], dtype=torch.float32), atol=1e-6)


def test_filters_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 260) * 3
    warpers = LogitsProcessorList([TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)])
    expected = warpers(None, logits / 0.8).softmax(-1)
    found = filtered_logprobs(logits, SamplingConfig(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05)).exp()
    assert torch.allclose(found, expected, atol=1e-6)

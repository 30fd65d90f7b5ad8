"""The vLLM engine of a generator worker; beside vllm_cpu.py the only module that imports vllm.

Runs in the worker's own process (no engine subprocess), on CPU and GPU by the same code.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from actors.generator_worker import Completion, Key, Request
from actors.vllm_cpu import KERNELS
from minigpt_ray.config import GeneratorConfig, SamplingConfig

T = TypeVar("T")
CPU_BATCH_TOKENS = 4096
"""Tokens that vLLM reads in one pass on a CPU."""
CHUNK_BYTES = 256 << 20
"""Weights that are sent to tensor-parallel processes at a time."""


@dataclass(frozen=True)
class Failed:
    """An exception of a part. vLLM would hand on one that is raised, or returned, in another process as a RuntimeError with its text."""

    error: Exception


class ModelPart:
    """What vLLM mixes into its worker, the object that holds one tensor-parallel part of the model in a process of its own.

    There vLLM imports this module for it, before the model is loaded, and vllm_cpu.py with it.
    """

    rank: int
    get_model: Callable[[], Any]

    def load_tensors(self, tensors: list[tuple[str, Tensor]]) -> None:
        self.get_model().load_weights(iter(tensors))

    def load_with(self, loader: Callable[..., T], args: tuple[Any, ...]) -> T | Failed:
        try:
            return loader(self.rank, self.get_model().load_weights, *args)
        except Exception as error:
            return Failed(error)


class VLLMEngine:
    """Generates with vLLM and takes new weights in place."""

    def __init__(self, path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int) -> None:
        gpu = torch.cuda.is_available()
        special: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization} if gpu else {"kv_cache_memory_bytes": config.kv_cache_mib << 20}
        if not gpu:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else parts ask for a NUMA node each
            # vLLM would compile two small functions, for which it needs a C++ compiler and, the first time, 20 seconds.
            torch._dynamo.config.disable = True
            # A prompt that is read in parts makes vLLM turn back its sample's random generator, which a CPU generator cannot.
            special |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(CPU_BATCH_TOKENS, max_model_len), "ir_op_priority": KERNELS}
        self.llm = LLM(
            model=path,
            dtype=config.dtype,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            enforce_eager=config.enforce_eager,
            enable_sleep_mode=config.sleep_between_phases,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="mp" if tensor_parallel > 1 else "uni",  # else vLLM looks for Ray in a placement group
            worker_extension_cls=f"{ModelPart.__module__}.{ModelPart.__qualname__}",
            load_format="safetensors",  # no pickled file
            generation_config="vllm",  # sampling is ours, not the checkpoint's
            logprobs_mode="processed_logprobs",  # after the temperature, as the learner computes them
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **special,
        )
        self.eos_token_id = self.llm.get_tokenizer().eos_token_id

    def submit(self, key: Key, request: Request, sampling: SamplingConfig) -> None:
        """Take a request; it is begun after those that came before it."""
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.llm.llm_engine.add_request(_name(key), TokensPrompt(prompt_token_ids=request.token_ids.tolist()), parameters)

    def step(self) -> list[tuple[Key, Completion]]:
        """One forward pass of all sequences in flight; the requests that have ended."""
        outputs = self.llm.llm_engine.step()
        return [(_key(output.request_id), _completion(output)) for output in outputs if isinstance(output, RequestOutput)]

    def cancel(self, keys: Sequence[Key]) -> None:
        """Forget requests, begun or not."""
        self.llm.llm_engine.abort_request([_name(key) for key in keys])

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights in place; what was cached for the old ones is dropped."""
        for chunk in _chunks(tensors, CHUNK_BYTES):
            self.llm.collective_rpc(ModelPart.load_tensors, args=(chunk,))
        self._forget()

    def load_by(self, loader: Callable[..., T], *args: Any) -> list[T]:
        """Call `loader(part, load, *args)` in every tensor-parallel process; with one GPU or none that is this process."""
        results = self.llm.collective_rpc(ModelPart.load_with, args=(loader, args))
        for result in results:
            if isinstance(result, Failed):
                raise result.error
        self._forget()
        return cast(list[T], results)

    def _forget(self) -> None:
        """Drop what was computed with the old weights."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps keys and values of the weights before, since it still computes with them")

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token t | tokens < t) of tokens 1 to the last, at temperature 1."""
        parameters = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([TokensPrompt(prompt_token_ids=list(token_ids))], [parameters], use_tqdm=False)
        assert output.prompt_logprobs is not None
        return [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True) if entry is not None]

    def sleep(self) -> None:
        """Give the GPU's memory back; weights and KV cache are lost, so weights are loaded again after `wake`."""
        self.llm.sleep(level=2)

    def wake(self) -> None:
        self.llm.wake_up()


def _chunks(tensors: Iterable[tuple[str, Tensor]], chunk_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    for name, tensor in tensors:
        chunk.append((name, tensor))
        if sum(t.nbytes for _, t in chunk) >= chunk_bytes:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _name(key: Key) -> str:
    return f"{key[0]}-{key[1]}"


def _key(name: str) -> Key:
    number, sample = name.split("-")
    return int(number), int(sample)


def _completion(output: RequestOutput) -> Completion:
    (best,) = output.outputs
    assert best.logprobs is not None
    logprobs = [entry[token].logprob for entry, token in zip(best.logprobs, best.token_ids, strict=True) if entry is not None]
    reason = "length" if best.finish_reason == "length" else "stop"
    return Completion(np.asarray(best.token_ids, np.int32), np.asarray(logprobs, np.float32), reason)

"""What a job asks of its reward sources before any process starts: that they exist, and read what its models write. Imports no torch, so that the answer comes at once."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import httpx

from actors.attempts import Fault, RewardError
from actors.reward_http import RewardServer
from actors.reward_process import load_function
from minigpt_ray.config import AnyReward, FunctionReward, HttpReward, ModelReward
from minigpt_ray.model_directory import VALIDATION, resolve_model
from minigpt_ray.tokenizer import PreTrainedTokenizerBase, load_tokenizer


def check_sources(sources: Mapping[str, AnyReward], run_dir: Path) -> None:
    """Raises ValueError or FileNotFoundError for a function or a model that does not exist, and a server that does not answer a request without samples."""
    for name, source in sources.items():
        if isinstance(source, ModelReward):
            path = resolve_model(source.init_from, run_dir)
            if source.normalize:
                load_calibration(f"rewards.{name}", path)
        elif isinstance(source, FunctionReward):
            load_function(name, source.function)
        elif isinstance(source, HttpReward):
            try:
                RewardServer(source, token_of(name, source))([])
            except (Fault, httpx.InvalidURL) as error:
                raise ValueError(f"rewards.{name}: {error}; start the server, or correct rewards.{name}.url") from None


def reward_models(sources: Mapping[str, AnyReward], run_dir: Path) -> dict[str, str]:
    """What `from_pretrained` takes, by `rewards.<name>`, of every reward model that is asked here."""
    return {f"rewards.{name}": resolve_model(source.init_from, run_dir) for name, source in sources.items() if isinstance(source, ModelReward)}


def check_vocabularies(sources: Mapping[str, AnyReward], run_dir: Path, tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Raise ValueError for a reward model that would take the token ids of one of these, by the names of their models, for other texts."""
    for reward, path in reward_models(sources, run_dir).items():
        vocabulary = load_tokenizer(path).get_vocab()
        for name, tokenizer in tokenizers.items():
            if tokenizer.get_vocab() != vocabulary:
                raise ValueError(
                    f"{reward}: the reward model {path} has another vocabulary than {name}, whose token ids it would read; train one with that tokenizer, "
                    "or serve it as text with jobs.serve_reward and kind: http"
                )


def token_of(name: str, source: HttpReward) -> str | None:
    """The bearer token that the environment holds; raises ValueError when it does not."""
    if source.token_env is None:
        return None
    token = os.environ.get(source.token_env, "")
    if not token:
        raise ValueError(
            f"rewards.{name}.token_env={source.token_env}: there is no such environment variable, or it is empty; export it where the driver runs, for a submitted job on the head node before `ray start`"
        )
    if not re.fullmatch("[!-~]+", token):
        raise ValueError(f"rewards.{name}.token_env={source.token_env}: the token has blanks, line ends or other than ASCII characters; export it without")
    return token


def load_calibration(name: str, path: str) -> tuple[float, float]:
    """Mean and standard deviation of a reward model's scores of held-out answers. Raises RewardError where its directory does not say."""
    file = Path(path) / VALIDATION
    measured = json.loads(file.read_text()) if file.is_file() else {}
    found = [measured.get(f"validation/{moment}", 0.0) for moment in ("reward_mean", "reward_std")]
    if not found[1] > 0:
        raise RewardError(f"{name}: normalize=true, but {file} holds no spread of held-out rewards; train with jobs.reward_model, or set normalize=false")
    return found[0], found[1]

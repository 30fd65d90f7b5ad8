"""Serve a reward over HTTP: an example of a server for `kind: http`, and a way to a reward model on a machine of its own.

    python -m jobs.serve_reward configs/debug/serve_reward.yaml
    python -m jobs.serve_reward function=my_rewards:short_text port=8000
    python -m jobs.serve_reward model=/models/reward port=8000

The function is `(samples: list[Sample]) -> list[float | None]` (minigpt_ray/reward_protocol.py). Runs until it is
interrupted, and says at which URL: rewards.judge={kind: http, url: "http://127.0.0.1:8000/score"}
"""

from minigpt_ray.cli import load_config, one_sentence
from minigpt_ray.config import ServeRewardConfig


def run(config: ServeRewardConfig) -> None:
    """Load, bind, serve; ends with a sentence where that cannot be."""
    import os

    from actors.reward_server import application, bind, load_scorer, serve

    with one_sentence():
        if config.token_env is not None and not os.environ.get(config.token_env):
            raise ValueError(f"token_env={config.token_env}: there is no such environment variable, or it is empty; export it")
        token = None if config.token_env is None else os.environ[config.token_env]
        app = application(load_scorer(config), token, config.max_request_bytes)
        listener = bind(config.host, config.port)
    serve(app, listener)


if __name__ == "__main__":
    run(load_config(ServeRewardConfig))

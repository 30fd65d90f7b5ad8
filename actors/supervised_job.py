"""What every supervised job does; which stage it is, its configuration says.

keep_running(train, load_config(SFTConfig))
"""

from minigpt_ray.cli import one_sentence
from minigpt_ray.config import SupervisedConfig


def train(config: SupervisedConfig) -> None:
    """Train from the newest checkpoint (checkpoint.resume=auto) or from the beginning; ends with a sentence where that cannot be."""
    from actors.stage_inputs import prepare

    with one_sentence():
        ready = prepare(config)

    from actors.supervised import SENTENCES, fit  # imports torch, for which what is refused above does not wait

    with one_sentence(SENTENCES):
        fit(ready)

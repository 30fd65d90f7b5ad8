"""A reward model behind a reward server."""

import torch

from minigpt_ray.models import TokenValues, load_scalar
from minigpt_ray.reward_protocol import Sample
from minigpt_ray.rl.batching import micro_batches
from minigpt_ray.tokenizer import encode_conversation, load_tokenizer


class ModelScorer:
    """A sequence-classification checkpoint with one label, which reads conversations with its own tokenizer."""

    def __init__(self, path: str, dtype: str, micro_batch_tokens: int) -> None:
        self.tokenizer, self.budget = load_tokenizer(path), micro_batch_tokens
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = TokenValues(load_scalar(path, dtype, seed=0)).eval().requires_grad_(False).to(self.device)

    def __call__(self, samples: list[Sample]) -> list[float]:
        """The head's output at the end token of each response."""
        conversations = [[*sample.prompt, {"role": "assistant", "content": sample.response}] for sample in samples]
        rows = [torch.from_numpy(encode_conversation(self.tokenizer, messages).token_ids) for messages in conversations]
        lengths = [len(row) for row in rows]
        scores = [0.0] * len(rows)
        for places in micro_batches(lengths, self.budget, ranks=1)[0] if rows else []:
            token_ids = torch.nn.utils.rnn.pad_sequence([rows[place] for place in places], batch_first=True).to(self.device)
            with torch.no_grad():
                values = self.model(token_ids).cpu()
            for row, place in enumerate(places):
                scores[place] = float(values[row, lengths[place]])
        return scores

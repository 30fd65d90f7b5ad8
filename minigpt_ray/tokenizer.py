"""The tokenizer: byte-level BPE with a ChatML template, and the two ways a conversation becomes token ids.

Generation encodes a prompt (`encode_prompt`), training a whole conversation with a loss mask (`encode_conversation`).
Both go through the same segments, so that the first is an exact prefix of the second whatever the merges are: the
policy is never asked for an answer in another context than the one it was trained in.

transformers, and with it torch, is imported where a tokenizer is made or loaded: what is refused before that is refused at once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

PAD, START, END, DOCUMENT_END = SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")

PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of the class that does what tokenizer.json says and no more, as `train_tokenizer` makes it."""
PLAIN_FOR = (None, "qwen3", "qwen3_moe", "llama")
"""Types of models, none beside a tokenizer alone, for which AutoTokenizer takes that class at its word."""

CHAT_TEMPLATE = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{% if message['role'] == 'assistant' %}
{% generation %}{{- message['content'] + '<|im_end|>' -}}{% endgeneration %}
{% else %}
{{- message['content'] + '<|im_end|>' -}}
{% endif %}
{{- '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""

Messages = Sequence[Mapping[str, str]]


class Example(NamedTuple):
    """One training example: token ids, and True where the loss counts the token."""

    token_ids: Int32[np.ndarray, "tokens"]
    loss_mask: Bool[np.ndarray, "tokens"]


class Segment(NamedTuple):
    """A stretch of the rendered conversation that is encoded on its own."""

    text: str
    learnt: bool


def train_tokenizer(texts: Iterable[str], vocab_size: int, phrases: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Byte-level BPE of at most `vocab_size` tokens, the 256 bytes and 4 special tokens included; digits stay single.

    Deterministic. `vocab_size=260` merges nothing: characters (bytes) as tokens. Raises ValueError below that. `phrases`
    become one token each, on top of `vocab_size`.
    """
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} has no room for the 256 bytes and {len(SPECIAL_TOKENS)} special tokens; use at least {smallest}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, extra_special_tokens=[START, DOCUMENT_END])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class TokenizerError(ValueError):
    """A tokenizer cannot be used: one sentence with its place and the remedy."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a directory (Path) or, as text, also from the hub. Raises TokenizerError when it is not there or has no end token."""
    if isinstance(path, Path) and not path.is_dir():
        raise TokenizerError(f"no tokenizer at {path}; python -m jobs.prepare_data trains one")
    tokenizer = _loader(Path(path)).from_pretrained(str(path), trust_remote_code=False)
    if tokenizer.eos_token is None:
        raise TokenizerError(f"the tokenizer {path} has no eos_token, so a response could never end; set eos_token in its tokenizer_config.json")
    return tokenizer


def _loader(directory: Path) -> Any:
    """AutoTokenizer, or what it would choose where that is plain: imported in seconds less, and with 100 MiB less."""
    if _field(directory / "tokenizer_config.json", "tokenizer_class") in PLAIN and _field(directory / "config.json", "model_type") in PLAIN_FOR:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _field(path: Path, name: str) -> Any:
    """A field of a JSON object; None without it, or without the file."""
    return json.loads(path.read_text(encoding="utf-8")).get(name) if path.is_file() else None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Int32[np.ndarray, "tokens"]:
    """Token ids of the conversation so far and the generation prompt: what the generator continues."""
    return _encode(tokenizer, _segments(tokenizer, messages, generation_prompt=True)).token_ids


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Example:
    """Token ids of a conversation that ends with the assistant, up to the end token that closes it.

    The loss mask is True on every assistant turn, its end token included. For each assistant turn i,
    `encode_prompt(tokenizer, messages[:i])` is an exact prefix. Raises ValueError when the chat template breaks that.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"the conversation ends with {messages[-1]['role'] if messages else 'nothing'}; training needs an assistant turn at its end")
    return _encode(tokenizer, _segments(tokenizer, messages, generation_prompt=False))


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """Token ids of a text and of its end; all are learnt. A special token that the text spells out stays text.

    The end is <|endoftext|>, or the end token of a tokenizer that does not know it.
    """
    end = DOCUMENT_END if DOCUMENT_END in tokenizer.get_vocab() else tokenizer.eos_token
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    token_ids = np.array([*ids, tokenizer.convert_tokens_to_ids(end)], np.int32)
    return Example(token_ids, np.ones(len(token_ids), bool))


def _segments(tokenizer: PreTrainedTokenizerBase, messages: Messages, generation_prompt: bool) -> list[Segment]:
    """Cut the rendered text where the model takes over and where it ends, which is where generation cuts it.

    Encoded in one piece, the newline of the generation prompt could merge with the first character of the answer.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no chat template; use one that has, or put chat_template.jinja into its directory")
    _refuse_special_tokens(tokenizer, messages)
    segments, done = [], ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:index], generation_prompt=True)
        closed = _render(tokenizer, messages[: index + 1], generation_prompt=False)
        turn, end, _ = _after(closed, prompt, index).partition(str(tokenizer.eos_token))
        if not end:
            raise ValueError(
                f"the chat template does not close message {index} (assistant) with the end token {tokenizer.eos_token!r}, "
                "so the end of a response would never be learnt; set eos_token to the token that the template writes"
            )
        segments += [Segment(_after(prompt, done, index), False), Segment(turn + end, True)]
        done = prompt + turn + end
    if generation_prompt:
        segments.append(Segment(_after(_render(tokenizer, messages, generation_prompt=True), done, len(messages)), False))
    return segments


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=generation_prompt))


def _after(text: str, prefix: str, index: int) -> str:
    if not text.startswith(prefix):
        raise ValueError(
            f"the chat template renders the text before message {index} differently once that message follows, so training would not see what "
            f"generation sees: {prefix[-40:]!r} became {text[max(len(prefix) - 40, 0) : len(prefix)]!r}; use a template that only appends"
        )
    return text[len(prefix) :]


def _refuse_special_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> None:
    """Written out in a message, a special token would be encoded as the real one and forge a turn or an end."""
    for index, message in enumerate(messages):
        for token in tokenizer.all_special_tokens:
            if token in message["content"]:
                raise ValueError(f"message {index} ({message['role']}) contains the special token {token!r}, which would forge a turn; remove it from the text")


def _encode(tokenizer: PreTrainedTokenizerBase, segments: Sequence[Segment]) -> Example:
    ids = tokenizer([segment.text for segment in segments], add_special_tokens=False)["input_ids"]
    mask = np.repeat([segment.learnt for segment in segments], [len(part) for part in ids])
    return Example(np.array([token for part in ids for token in part], np.int32), mask)

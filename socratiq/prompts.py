"""The one prompt template and the one way to turn text into token ids. SFT, pairs, DPO, PPO and `ask` all come here."""

from functools import lru_cache

from socratiq.run.errors import UserError

# Word for word the template the questions of the task were collected with, its trailing space included.
TEMPLATE_HEAD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. \n"
    "Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "You will see a text and you should generate one critical question in the format {type} for this text.\n"
    "\n"
    "### Input:\n"
)
TEMPLATE_TAIL = "\n\n### Response:\n"


def build_prompt(context: str, type: str) -> str:
    """The prompt as text. `type` is a display name such as "Cause to effect"; for "" no format is named."""
    head = TEMPLATE_HEAD.replace("{type}", type) if type else TEMPLATE_HEAD.replace(" in the format {type}", "")
    return head + context + TEMPLATE_TAIL


def encode_prompt(tokenizer, context: str, type: str, max_tokens: int) -> list[int]:
    """Token ids of the prompt, at most `max_tokens` of them: a long context loses its own tail, never the template.

    One BOS comes first if this tokenizer adds one. Raises UserError if the template alone is too long.
    """
    text = build_prompt(context, type)
    prompt = bos(tokenizer) + plain_ids(tokenizer, text)
    kept = len(context)
    while len(prompt) > max_tokens:  # cut the text, not the ids: what is left is tokenised as usual
        if kept == 0:
            raise UserError(
                f"--max-prompt-tokens {max_tokens}: the template alone takes {len(prompt)} tokens; allow more than that"
            )
        kept = max(0, min(kept - 1, int(kept * max_tokens / len(prompt))))
        prompt = bos(tokenizer) + plain_ids(tokenizer, build_prompt(context[:kept].rstrip(), type))
    return prompt


def encode_pair_prompt(tokenizer, pair, max_tokens: int) -> list[int]:
    """Token ids of a pair's prompt. One that make_pairs.py built can lose its context's tail; a foreign one cannot.

    Raises UserError if a foreign prompt is longer than `max_tokens`.
    """
    if pair.context and pair.prompt == build_prompt(pair.context, pair.type):
        return encode_prompt(tokenizer, pair.context, pair.type, max_tokens)
    prompt = bos(tokenizer) + plain_ids(tokenizer, pair.prompt)
    if len(prompt) > max_tokens:
        raise UserError(
            f"{pair.source}: the prompt has {len(prompt)} tokens; raise --max-prompt-tokens or remove the line"
        )
    return prompt


def encode_completion(tokenizer, question: str) -> list[int]:
    """Token ids of a question, EOS at the end. Tokenised apart from the prompt, so that the boundary never moves."""
    return [*plain_ids(tokenizer, question), tokenizer.eos_token_id]


def decode(tokenizer, ids: list[int]) -> str:
    """The text of a completion up to its EOS, stripped. Other control tokens show: a reward must see what was asked."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=False).strip()


def plain_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text in which nothing is a control token: "<|im_end|>" in a row of data is seven harmless pieces.

    Tokenizers cut up their special tokens on request, but not those that were added as ordinary ones, such as Qwen3's
    "<think>". A text that holds one of them goes through the tokenizer's steps without its added vocabulary.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if added_ids(tokenizer).isdisjoint(ids):
        return ids
    steps = tokenizer.backend_tokenizer
    if steps.normalizer:
        text = steps.normalizer.normalize_str(text)
    words = [word for word, _ in steps.pre_tokenizer.pre_tokenize_str(text)] if steps.pre_tokenizer else [text]
    return [token.id for word in words for token in steps.model.tokenize(word)]


@lru_cache
def added_ids(tokenizer) -> frozenset[int]:
    """Ids of the added tokens that are not special; runs of spaces or newlines, which some tokenizers add, are text."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if not token.special and token.content.strip(" \t\n▁"))


def bos(tokenizer) -> list[int]:
    """[BOS] if the tokenizer begins every text with one, as the model's training did; else []."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []

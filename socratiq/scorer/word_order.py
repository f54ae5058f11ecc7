"""Do people put words in this order? Learnt from the texts and questions of the rows; no language model is needed.

At every joint of two neighbouring words two witnesses are heard, and what they say is added:

    log (n(ab) + k) / (n(a) n(b) / N + k)      how often words a and b met, over how often chance would have it
    log p(whole | three words on either side)  by a small net that was shown whole joints and broken ones

Two common words that never met are a seam; two rare ones say nothing, and k is for what is too rare to tell. The net
sees further, and knows words that behave alike.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F

from socratiq.scorer.gates import tokens
from socratiq.scorer.grading import place

VOCABULARY = 1000  # the commonest words and marks; others are known by their endings: grammar counts, not the subject
ENDINGS = ("ing", "tion", "ed", "ly", "er", "al", "s", "")
SHAPES = (*(f"<{ending}>" for ending in ENDINGS), "<number>", "<mark>", "<start>", "<end>", "<nothing>")
K = 0.1
LOWEST, STEEP = 0.05, 5.0  # share of the rows' questions that are worth less than 1, and how fast worth falls there
PARTS = 3  # questions about one part of the texts say what such questions reach, unseen
SIDE, HIDDEN = 3, 64  # words that the net sees on either side, and its width
EPOCHS, STEPS = 2, 600  # passes over the joints, or so many steps at most
BATCH, RATE, DECAY = 1024, 0.02, 0.01  # joints at a time, and as many broken ones; of AdamW
QUESTION = 3  # a joint of a question is shown as often as so many of a text


class WordOrder:
    """1 for nearly all genuine questions, nearly 0 for words in no order.

    A question gains the mean over its joints, of which the lowest quarter count double: one seam in an otherwise good
    question shows there. Below what nearly all genuine ones gain its worth falls off exponentially: however bad a
    question is, a worse one is worth less.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], settings: dict):
        """Of the tensors (V words, H wide) those that begin with "order_"; settings: the vocabulary, and two gains."""
        self.tensors = {name: x for name, x in tensors.items() if name.startswith("order_")}
        self.settings = settings
        self.ids = {word: i for i, word in enumerate([*settings["vocabulary"], *SHAPES])}
        counts = torch.zeros(len(self.ids) ** 2)
        counts[self.tensors["order_pairs"].long()] = self.tensors["order_counts"].float()
        counts = counts.view(len(self.ids), -1)  # n(ab)
        expected = torch.outer(counts.sum(1), counts.sum(0)) / counts.sum()
        self.excess = ((counts + K) / (expected + K)).log()  # (V, V)

    @classmethod
    def fit(cls, contexts: list[str], questions: list[str]) -> WordOrder:
        """Learn from all texts. How much questions gain is seen on a part of them, by what the other texts teach."""
        common = Counter(token for text in [*set(contexts), *questions] for token in tokens(text))
        settings = {"vocabulary": sorted(common, key=lambda w: (-common[w], w))[:VOCABULARY]}
        empty = cls({"order_pairs": torch.zeros(0), "order_counts": torch.zeros(0)}, settings)
        joints = {text: empty.joints(text) for text in (*contexts, *questions)}
        rows = sorted(zip(contexts, questions, strict=True))
        known = [row for row in rows if place(row[0]) % PARTS > 0] or rows
        unseen = [question for context, question in rows if place(context) % PARTS == 0] or questions
        taught = cls(empty.learn(known, joints), settings)
        gains = taught.gains(unseen).sort().values
        settings["low"], settings["median"] = (gains[int(share * len(gains))].item() for share in (LOWEST, 0.5))
        return cls(empty.learn(rows, joints), settings)

    def learn(self, rows: list[tuple[str, str]], joints: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Count the pairs of (context, question) rows and train a net on their joints: the tensors."""
        of_texts = torch.cat([joints[context] for context in sorted({context for context, _ in rows})])
        of_questions = torch.cat([joints[question] for _, question in rows])
        a, b = torch.cat([of_texts, of_questions])[:, SIDE - 1 : SIDE + 1].T
        pairs, counts = (a * len(self.ids) + b).unique(return_counts=True)
        net = train(torch.cat([of_texts, *[of_questions] * QUESTION]), len(self.ids))
        return {"order_pairs": pairs, "order_counts": counts, **net}

    def shape(self, token: str) -> str:
        """A common word or mark itself, a number, another mark, or the ending of another word."""
        if token in self.ids or not token[0].isalpha():
            return token if token in self.ids else "<number>" if token[0].isdigit() else "<mark>"
        return f"<{next(ending for ending in ENDINGS if token.endswith(ending))}>"

    def joints(self, text: str) -> torch.Tensor:
        """The words around every joint, ids (J, 2 * SIDE). There is one joint more than words and marks."""
        around = ["<nothing>"] * (SIDE - 1)
        shapes = [*around, "<start>", *map(self.shape, tokens(text)), "<end>", *around]
        return torch.tensor([self.ids[shape] for shape in shapes], dtype=torch.int32).unfold(0, 2 * SIDE, 1)

    def gains(self, questions: list[str]) -> torch.Tensor:
        """(N,) in nats a joint."""
        of_each = [self.joints(question) for question in questions]
        joints = torch.cat(of_each)
        a, b = joints[:, SIDE - 1 : SIDE + 1].T
        said = self.excess[a, b] + F.logsigmoid(whole(joints, **self.tensors))
        ordered = [part.sort().values for part in said.split(list(map(len, of_each)))]
        return torch.stack([torch.cat([part, part[: -(-len(part) // 4)]]).mean() for part in ordered])

    def __call__(self, questions: list[str]) -> torch.Tensor:
        """(N,) in 0..1."""
        low, median = self.settings["low"], self.settings["median"]
        return (STEEP * (self.gains(questions) - low) / max(median - low, 0.25)).clamp(max=0).exp()


def whole(joints: torch.Tensor, order_table, order_hidden, order_out, order_bias, **_) -> torch.Tensor:
    """Log-odds (J,) that nothing is broken at these joints (J, 2 * SIDE): one hidden layer over words by their place.

    Table (2 * SIDE * V, H): what each word adds to the hidden layer in each place. Hidden (H,) and bias (1,), out (H,).
    """
    of_place = torch.arange(2 * SIDE) * (len(order_table) // (2 * SIDE))
    hidden = F.embedding_bag(joints + of_place, order_table.float(), mode="sum") + order_hidden  # (J, H)
    return F.relu(hidden) @ order_out + order_bias


def train(joints: torch.Tensor, vocabulary: int) -> dict[str, torch.Tensor]:
    """The tensors of `whole`, by logistic regression of whole joints against broken ones; its draws never change."""
    draw = torch.Generator().manual_seed(0)
    net = {
        "order_table": torch.randn(2 * SIDE * vocabulary, HIDDEN, generator=draw) * 0.1,
        "order_hidden": torch.zeros(HIDDEN),
        "order_out": torch.randn(HIDDEN, generator=draw) * 0.1,
        "order_bias": torch.zeros(1),
    }
    optimizer = torch.optim.AdamW([x.requires_grad_() for x in net.values()], weight_decay=DECAY, fused=True)
    steps = max(1, min(STEPS, EPOCHS * len(joints) // BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    is_whole = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)])
    for _ in range(steps):
        here, there = joints[torch.randint(len(joints), (2, BATCH), generator=draw)]
        broken = broken_joints(here, there, torch.randint(6, (BATCH, 1), generator=draw))
        counts = torch.cat([torch.ones(BATCH), (broken != here).any(1).float()])  # two neighbours may be the same word
        logits = whole(torch.cat([here, broken]), **net)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, is_whole, counts).backward()
        optimizer.step()
        schedule.step()
    net = {name: x.detach() for name, x in net.items()}
    return net | {"order_table": net["order_table"].half()}  # the largest, by far


def broken_joints(here: torch.Tensor, there: torch.Tensor, how: torch.Tensor) -> torch.Tensor:
    """Joints (J, 2 * SIDE) where no question goes on like this.

    `how` (J, 1): 0, 1 and 2 exchange two neighbours before, at or behind the joint; from 3 on what follows is from
    `there`.
    """
    column = torch.arange(2 * SIDE)
    first = SIDE - 2 + how % 3  # of the two that change places
    exchanged = here.gather(1, column + (column == first).long() - (column == first + 1).long())
    return torch.where(how < 3, exchanged, torch.where(column < SIDE, here, there))

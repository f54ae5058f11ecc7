"""The question types: what each is called, how data sets spell it, what it means.

Two families share one table. Four types come from argumentation schemes (Walton, Reed and Macagno,
"Argumentation Schemes", 2008): every scheme has critical questions that test it. Five come from the types of
Socratic questions in SocratiQ (Ang, Gollapalli and Ng, EACL 2023), after Paul and Elder.

The table is a start, not a fence: a label that it does not know becomes a type of its own, see `display_name`.
"""

import re
from functools import lru_cache
from typing import NamedTuple


class QuestionType(NamedTuple):
    """One kind of critical question.

    name:       display name, the words that stand in the prompt
    spellings:  labels of this type in data sets; letter case, spaces and punctuation do not matter when looking one up
    definition: what a question of this type does, one sentence without a subject: "Asks ..."
    example:    one such question, understandable without its text
    """

    name: str
    spellings: tuple[str, ...]
    definition: str
    example: str


TYPES = (
    QuestionType(
        "Cause to effect",
        ("CauseToEffect", "cause_to_effect", "cause_effect", "causal"),
        "Asks whether the claimed cause really brings about the claimed effect: how strong the link is, what else "
        "could explain the effect, and what could keep it from happening.",
        "Could the lower crime rate have come from the new jobs in town rather than from the cameras?",
    ),
    QuestionType(
        "Analogy",
        ("analogy", "argument_from_analogy", "comparison"),
        "Asks whether two things that the text likens are alike in the way that matters, and where the likeness ends.",
        "Is running a country really like running a household, when a household cannot print its own money?",
    ),
    QuestionType(
        "Fear appeal",
        ("FearAppeal", "fear_appeal", "danger_appeal"),
        "Asks whether a threatened harm is as likely and as bad as the text paints it, and whether what the text "
        "calls for would avert it at all.",
        "How likely is the collapse that you warn of, and would this ban actually prevent it?",
    ),
    QuestionType(
        "Expert opinion",
        ("ExpertOpinion", "expert_opinion", "argument_from_expert_opinion"),
        "Asks about an authority that the text leans on: expert in this very field or not, trustworthy, rightly "
        "quoted, in agreement with other experts and with the evidence.",
        "Has that doctor studied vaccines, and do other immunologists agree with her?",
    ),
    QuestionType(
        "Clarity",
        ("clarity", "clarification"),
        "Asks what a word, a phrase or the point of the text means, or for a case that would make it plain.",
        "What exactly do you mean by a fair share?",
    ),
    QuestionType(
        "Assumptions",
        ("assumptions", "assumption", "probing_assumptions"),
        "Asks about something that the text takes for granted without saying or defending it.",
        "Are you presuming that everybody who rents would rather own a home?",
    ),
    QuestionType(
        "Reasons and evidence",
        ("reasons_evidence", "reasons_and_evidence", "reason_evidence", "reasons"),
        "Asks for the grounds of a claim: why to believe it, where it was observed, what would speak against it.",
        "What makes you think that homework is the reason why pupils sleep less?",
    ),
    QuestionType(
        "Implications and consequences",
        (
            "implication_consequences",
            "implications_consequences",
            "implications_and_consequences",
            "implications",
            "consequences",
        ),
        "Asks what would follow if the text were right or acted upon: effects, costs, cases that it would also cover.",
        "If phones were banned at school, how would pupils reach their parents in an emergency?",
    ),
    QuestionType(
        "Alternate viewpoints and perspectives",
        (
            "alternate_viewpoints_perspectives",
            "alternate_viewpoints_and_perspectives",
            "alternative_viewpoints_perspectives",
            "alternate_viewpoints",
            "viewpoints_perspectives",
        ),
        "Asks how the matter looks from another side: to other people, under another aim, or with another solution.",
        "How would a shop owner whose customers come by car see this plan?",
    ),
)

OTHERS = "others"  # the label of rows that are no critical question; negatives for the scorer, not a type


def _key(label: str) -> str:
    """What is left of a label when case, spaces and punctuation are gone: "Cause-to Effect" -> "causetoeffect"."""
    return "".join(letter for letter in label.casefold() if letter.isalnum())


_NAMES = {_key(spelling): kind.name for kind in TYPES for spelling in (kind.name, *kind.spellings)}
_NAMES |= {_key(spelling): OTHERS for spelling in (OTHERS, "other")}
_DEFINITIONS = {kind.name: kind.definition for kind in TYPES}


@lru_cache
def display_name(label: str) -> str:
    """The display name for any spelling of a label; applying it twice changes nothing.

    `reasons_evidence` -> "Reasons and evidence", `other` -> "others". A label outside the table is a type that only
    this data set knows; it is tidied, so that its spellings fall together: `MoralAppeal` and `moral_appeal` both become
    "Moral appeal".
    """
    known = _NAMES.get(_key(label))
    if known:
        return known
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", label)  # camelCase -> camel Case
    words = re.sub(r"[\s_-]+", " ", words).strip(" .,;:").lower()
    first = words[:1].upper()  # "SS" for ß, which has no capital of its own
    words = (first if len(first) == 1 else words[:1]) + words[1:]
    return _NAMES.get(_key(words), words)


def definition(name: str) -> str:
    """The definition of a type by its display name, "" for a type that the table does not know."""
    return _DEFINITIONS.get(name, "")

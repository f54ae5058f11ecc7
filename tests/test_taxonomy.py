"""The table of question types: nine of them, found under any spelling."""

import pytest

from socratiq.taxonomy import OTHERS, TYPES, definition, display_name

NAMES = [kind.name for kind in TYPES]


def test_nine_types_with_words_of_their_own():
    assert NAMES[:5] == ["Cause to effect", "Analogy", "Fear appeal", "Expert opinion", "Clarity"]
    assert NAMES[5:7] == ["Assumptions", "Reasons and evidence"]
    assert NAMES[7:] == ["Implications and consequences", "Alternate viewpoints and perspectives"]
    for kind in TYPES:
        assert kind.definition.startswith("Asks ") and kind.definition.endswith(".")
        assert kind.example.endswith("?") and kind.example.count("?") == 1
        assert definition(kind.name) == kind.definition
        assert {display_name(spelling) for spelling in (kind.name, *kind.spellings)} == {kind.name}  # and no other's
    assert len({kind.definition for kind in TYPES}) == len({kind.example for kind in TYPES}) == 9


@pytest.mark.parametrize(
    "label, name",
    [
        ("CauseToEffect", "Cause to effect"),
        ("reasons_evidence", "Reasons and evidence"),
        ("alternate_viewpoints_perspectives", "Alternate viewpoints and perspectives"),
        ("  cause-to EFFECT ", "Cause to effect"),
        ("REASONS & EVIDENCE", "Reasons and evidence"),
        ("Reasons/Evidence", "Reasons and evidence"),
        ("Other", OTHERS),
        # types that only a data set knows
        *((label, "Moral appeal") for label in ("MoralAppeal", "moral_appeal", "MORAL_APPEAL", "moral-appeal")),
        ("QA", "Qa"),
        ("ßA", "ßa"),
        ("état_final", "État final"),
        ("", ""),
        ("  ?! ", "?!"),
    ],
)
def test_display_name(label, name):
    assert display_name(label) == name
    assert display_name(name) == name


def test_unknown_types_and_others_have_no_definition():
    assert definition("Moral appeal") == definition(OTHERS) == ""

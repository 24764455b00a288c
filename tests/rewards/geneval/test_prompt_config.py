"""How prompts are worded, and what a configuration of them may say."""

from pathlib import Path

import pytest

from core.recipe import ConfigError
from rewards.geneval.prompt_config import TrainPromptConfig, load_config
from rewards.geneval.prompt_grammar import WORDINGS, article, noun_phrase, plural, prompt_text


@pytest.mark.parametrize(
    ("name", "official", "english"),
    [
        ("clock", "clocks", "clocks"),
        ("bus", "buses", "buses"),
        ("wine glass", "wine glasses", "wine glasses"),
        ("frisbee", "frisbees", "frisbees"),
        ("skis", "skis", "skis"),
        ("scissors", "scissors", "scissors"),
        ("tv", "tvs", "tvs"),
        ("teddy bear", "teddy bears", "teddy bears"),
        ("knife", "knifes", "knives"),
        ("sheep", "sheeps", "sheep"),
        ("person", "persons", "people"),
        ("toothbrush", "toothbrushs", "toothbrushes"),
        ("sandwich", "sandwichs", "sandwiches"),
        ("computer mouse", "computer mouses", "computer mice"),
        ("lunch box", "lunch boxs", "lunch boxes"),
        ("fairy", "fairys", "fairies"),
        ("toy", "toys", "toys"),
    ],
)
def test_plurals_of_either_wording(name, official, english):
    assert (plural(name), plural(name, "english")) == (official, english)


def test_articles_follow_the_sound():
    an = ["apple", "elephant", "orange cow", "umbrella", "unimportant cup", "hourglass", "oven", "ink pot"]
    a = ["dog", "horse", "unicorn", "uniform", "used car", "european car", "one-way sign", "ukulele", "house"]
    assert [article(words) for words in an + a] == [f"an {w}" for w in an] + [f"a {w}" for w in a]


def test_english_counts_pairs_by_the_pair():
    assert noun_phrase("scissors", 1, "orange", "english") == "a pair of orange scissors"
    assert noun_phrase("skis", 3, None, "english") == "three pairs of skis"
    assert noun_phrase("broccoli", 2, None, "english") == "two heads of broccoli"
    assert noun_phrase("scissors", 1, "orange") == "an orange scissors"
    assert noun_phrase("ox", 15, "red", plurals={"ox": "oxen"}) == "fifteen red oxen"


def config_of(tmp_path: Path, text: str) -> TrainPromptConfig:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    return load_config(path)


def test_yaml_over_the_defaults(tmp_path):
    assert load_config(None) == TrainPromptConfig() == config_of(tmp_path, "")
    config = config_of(
        tmp_path,
        "classes: [dog, ox]\ncounts: [2, 7]\ntag_weights: {position: 0}\nplurals: {ox: oxen}\nrepeats: true\n",
    )
    assert (config.classes, config.counts, config.plurals) == (["dog", "ox"], [2, 7], {"ox": "oxen"})
    assert (config.tag_weights.position, config.tag_weights.counting, config.repeats) == (0, 5, True)
    assert prompt_text([{"class": "ox", "count": 7}], plurals=config.plurals) == "a photo of seven oxen"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("colours: [red]", ["unknown key 'colours': did you mean 'colors'?"]),
        (
            "tag_weights: {positon: 1}",
            ["unknown key 'tag_weights.positon': did you mean 'tag_weights.position'?"],
        ),
        ("- dog", ["a recipe is a mapping of keys, found a ListConfig"]),
        ("classes: [", ["prompts.yaml: while parsing"]),
        ("classes: null", ["classes"]),
        ("counts: [two]", ["counts"]),
        ("tag_weights: 3", ["tag_weights"]),
        ("counts: [1, 16]", ["counts[0]=1 must be in [2, 15]", "counts[1]=16 must be in [2, 15]"]),
        ("colors: [teel]", ["colors: unknown name 'teel': "]),
        ("relations: [left]", ["relations: unknown name 'left': did you mean 'left of'?"]),
        ("classes: [Dog, dog, '!']", ["classes: 'dog' is there twice", "classes: an entry holds no word"]),
        ("unseen_classes: [dgo]", ["unseen_classes: unknown name 'dgo': did you mean 'dog'?"]),
        ("uncolored: [persn]", ["uncolored: unknown name 'persn': did you mean 'person'?"]),
        ("plurals: {shep: sheep}", ["plurals: unknown name 'shep': did you mean 'sheep'?"]),
        ("wording: german", [f"wording='german' is not one of {', '.join(WORDINGS)}"]),
        ("unseen_count: 81", ["unseen_count: 81 is not in 0..80"]),
        ("unseen_count: 1\nunseen_classes: [dog]", ["not both"]),
        (
            "tag_weights: {counting: -1, colors: .nan}",
            ["tag_weights.counting=-1 must be at least 0", "tag_weights.colors=nan must be finite"],
        ),
        (
            "tag_weights: {two_object: 0, counting: 0, colors: 0, position: 0, color_attr: 0}",
            ["tag_weights: all are 0"],
        ),
    ],
)
def test_a_bad_configuration_is_refused_with_every_problem(tmp_path, text, messages):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, text)
    assert len(caught.value.problems) == len(messages)
    for message in messages:
        assert message in str(caught.value)


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")

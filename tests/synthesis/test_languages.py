import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

from shards.errors import BadRequest
from synthesis import languages
from synthesis.languages import NAMES, check_language, language_of


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "What colour is the cup? The cup is red."),
        ("de", "Was ist in der Tasse? Ein Espresso."),
        ("fr", "Qu'est-ce que c'est ?"),
        ("zh", "\u8fd9\u662f\u4ec0\u4e48\uff1f\u4e00\u53ea\u732b"),
        ("ja", "\u4f55\u3067\u3059\u304b\uff1f\u732b\u3067\u3059"),
        ("", "cat"),
        ("", "Wooden Gate Icon"),
        ("", "12:30 ?"),
        ("", ""),
    ],
)
def test_languages(language: str, text: str) -> None:
    assert language_of(text) == language


def test_threads_load_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = languages._identifier.__wrapped__

    def counted() -> object:
        loaded.append(1)
        return load()

    monkeypatch.setattr(languages, "_identifier", functools.cache(counted))
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(language_of, ["What is in the cup on the table?"] * 16)) == {"en"}
    assert len(loaded) == 1


def test_asking_for_a_language() -> None:
    assert check_language("auto") == "auto" and check_language("de") == "de" and NAMES["de"] == "German"
    for given, hint in (("german", "'de'"), ("xx", "neither auto")):
        with pytest.raises(BadRequest, match=hint):
            check_language(given)

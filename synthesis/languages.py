"""Languages of texts: by py3langid's model, which comes with it, calibrated also for short texts."""

import difflib
import functools
import threading
from typing import Any

from shards.errors import BadRequest

MIN_CONFIDENCE = 0.6
"""Below it no language is named. Measured: "drawing of a yellow duck" .82, "Una taza de cafe sobre la mesa" .54, "A cup of espresso" .20 (wrong)."""
AUTO = "auto"
_LOADING = threading.Lock()  # a cache alone lets every thread that finds it empty load for a second
NAMES = {
    code: name
    for code, _, name in (
        entry.partition(":")
        for entry in [
            "af:Afrikaans",
            "ar:Arabic",
            "az:Azerbaijani",
            "be:Belarusian",
            "bg:Bulgarian",
            "bn:Bengali",
            "bs:Bosnian",
            "ca:Catalan",
            "cs:Czech",
            "cy:Welsh",
            "da:Danish",
            "de:German",
            "el:Greek",
            "en:English",
            "eo:Esperanto",
            "es:Spanish",
            "et:Estonian",
            "eu:Basque",
            "fa:Persian",
            "fi:Finnish",
            "fr:French",
            "ga:Irish",
            "gl:Galician",
            "gu:Gujarati",
            "he:Hebrew",
            "hi:Hindi",
            "hr:Croatian",
            "hu:Hungarian",
            "hy:Armenian",
            "id:Indonesian",
            "is:Icelandic",
            "it:Italian",
            "ja:Japanese",
            "ka:Georgian",
            "kk:Kazakh",
            "km:Khmer",
            "kn:Kannada",
            "ko:Korean",
            "ky:Kyrgyz",
            "la:Latin",
            "lo:Lao",
            "lt:Lithuanian",
            "lv:Latvian",
            "mk:Macedonian",
            "ml:Malayalam",
            "mn:Mongolian",
            "mr:Marathi",
            "ms:Malay",
            "mt:Maltese",
            "ne:Nepali",
            "nl:Dutch",
            "no:Norwegian",
            "pa:Punjabi",
            "pl:Polish",
            "ps:Pashto",
            "pt:Portuguese",
            "ro:Romanian",
            "ru:Russian",
            "si:Sinhala",
            "sk:Slovak",
            "sl:Slovenian",
            "sq:Albanian",
            "sr:Serbian",
            "sv:Swedish",
            "sw:Swahili",
            "ta:Tamil",
            "te:Telugu",
            "th:Thai",
            "tl:Tagalog",
            "tr:Turkish",
            "ug:Uyghur",
            "uk:Ukrainian",
            "ur:Urdu",
            "vi:Vietnamese",
            "xh:Xhosa",
            "zh:Chinese",
            "zu:Zulu",
        ]
    )
}
"""English names of the languages that can be asked for, by ISO 639-1 code."""


def language_of(text: str) -> str:
    """The code of a text's language; empty where that is not clear, as of few words. Gives the same for the same text."""
    if not any(char.isalpha() for char in text):
        return ""
    with _LOADING:
        identifier = _identifier()
    language, confidence = identifier.classify(text)
    return str(language) if confidence >= MIN_CONFIDENCE else ""


def check_language(code: str) -> str:
    """The code itself, or `auto`. Raises BadRequest for a language that has no name here."""
    if code == AUTO or code in NAMES:
        return code
    names = {name.lower(): known for known, name in NAMES.items()}
    close = difflib.get_close_matches(code.lower(), [*names, *NAMES], 1)
    hint = f"; did you mean '{names.get(close[0], close[0])}'?" if close else ""
    raise BadRequest(f"--answer-language {code}: neither auto nor one of {', '.join(NAMES)}{hint}")


@functools.cache
def _identifier() -> Any:
    # Here: it takes most of a second, and nobody needs it who synthesises nothing.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

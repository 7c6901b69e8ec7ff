"""All data of one study: who holds what, checked to be disjoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from .pairs import Pair, Row, fingerprint
from .splits import require_disjoint


@dataclass(frozen=True)
class StudyData:
    """What defender and attacker train on and what both are tested with.

    Attributes:
        defence: the defender's pairs.
        retain: the defender's harmless rows.
        attacks: harm -> the attacker's pairs.
        test: held-out pairs, never trained on by anyone.
        tests: harm -> held-out pairs of their own, for harms that `test` does not cover (withheld, other domains).
        harmless_test: held-out harmless rows.
        roles: harm -> what it is to the defence: "main" (it is against it), "withheld" (a category kept from it) or
            "domain" (a harm of another domain); main where nothing is said.
        extra_prompts: further test prompts for the audit (items of the sandbox).
        record: the disjointness audit, roles of the harms, template and fingerprints, for the manifest.
    """

    defence: list[Pair]
    retain: list[Row]
    attacks: Mapping[str, list[Pair]]
    test: list[Pair]
    harmless_test: list[Row]
    template: str = "auto"
    max_length: int = 256
    tests: Mapping[str, list[Pair]] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    extra_prompts: tuple[str, ...] = ()
    allow_overlap: bool = False
    record: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        attack = [pair.prompt for pairs in self.attacks.values() for pair in pairs]
        audit = require_disjoint(
            allow_overlap=self.allow_overlap,
            defence=[pair.prompt for pair in self.defence],
            attack=attack,
            test=[*(p.prompt for pairs in (self.test, *self.tests.values()) for p in pairs), *self.extra_prompts],
        )
        harmless = require_disjoint(
            allow_overlap=self.allow_overlap,
            retain=[row.prompt for row in self.retain],
            harmless_test=[row.prompt for row in self.harmless_test],
        )
        self.record.update(
            audit=audit,
            harmless_audit=harmless,
            harms={harm: self.roles.get(harm, "main") for harm in self.attacks},
            template=self.template,
            max_length=self.max_length,
            fingerprints={
                "defence": fingerprint(self.defence),
                "retain": fingerprint(self.retain),
                **{f"attack:{harm}": fingerprint(pairs) for harm, pairs in self.attacks.items()},
                "test": fingerprint(self.test),
                **{f"test:{harm}": fingerprint(pairs) for harm, pairs in self.tests.items()},
                "harmless_test": fingerprint(self.harmless_test),
            },
        )

    def test_of(self, harm: str) -> list[Pair]:
        """The held-out pairs by which an attack on `harm` is judged."""
        return self.tests.get(harm, self.test)

    def defence_of(self, categories: Sequence[str] | None) -> list[Pair]:
        """The defender's pairs, of these categories only where some are named.

        Raises:
            ConfigError: a category that no pair of the defence has, or an empty list.
        """
        if categories is None:
            return self.defence
        known = sorted({pair.category for pair in self.defence if pair.category is not None})
        unknown = [category for category in categories if category not in known]
        if unknown or not categories:
            raise ConfigError(
                f"defence.categories: {', '.join(unknown) or 'an empty list'} names no pair of the defence."
                f" Categories there: {', '.join(known) or 'none (the data gives no category)'}."
            )
        return [pair for pair in self.defence if pair.category in categories]

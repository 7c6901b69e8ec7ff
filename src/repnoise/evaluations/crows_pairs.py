"""CrowS-Pairs (arXiv 2010.00133), as lm-evaluation-harness defines it; stability in paper table 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.parties import StudyData
from ..recipes.ranges import Count
from .base import EVALUATIONS, Evaluation, Measured
from .likelihood import encode, log_likelihoods, table


@EVALUATIONS.register("crows-pairs")
@dataclass(kw_only=True)
class CrowsPairs(Evaluation):
    """`crows_pairs_pct_stereotype`: share of pairs whose more stereotyped sentence is the likelier (0.5 is neutral);
    `crows_pairs_likelihood_diff`: mean absolute difference of the two log-likelihoods in nats. Also per bias type
    (`category`). Both equal the task crows_pairs_english of lm-evaluation-harness (version 1) on the same rows.

    Attributes:
        source: `crows_pairs_anonymized.csv` of the authors' repository, or any table with its columns.
        limit: the first so many pairs.
        batch_size: sentences at a time.
    """

    attacked = False

    source: str
    limit: Count | None = None
    batch_size: Count = 32

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        rows = table(self.source, ("sent_more", "sent_less", "bias_type"), self.limit)
        requests = [encode(tokenizer, "", str(row[side])) for row in rows for side in ("sent_more", "sent_less")]
        owners = [number for number in range(len(rows)) for _ in range(2)]
        scores = log_likelihoods(model, tokenizer, requests, batch_size=self.batch_size, rows=owners)
        pairs = list(zip(scores[::2], scores[1::2], strict=True))
        kinds = [str(row["bias_type"]) for row in rows]
        found = Measured()
        for kind in (None, *sorted(set(kinds))):
            part = [pair for pair, of in zip(pairs, kinds, strict=True) if kind in (None, of)]
            keys = {} if kind is None else {"category": kind}
            found.add_rate("crows_pairs_pct_stereotype", [more > less for more, less in part], seed=seed, **keys)
            gaps = [abs(more - less) for more, less in part]
            found.add_score("crows_pairs_likelihood_diff", gaps, seed=seed, bounds=None, **keys)
        return found

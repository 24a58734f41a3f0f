"""What the alignment evaluation found, as one value: JSON for machines, rows of a table for people.

Nothing is computed here but the estimates of the scored sets; ``figure`` draws the distributions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cffa_core.evaluation.alignment import ScoredSet, normalised
from cffa_core.evaluation.bootstrap import Estimate, Eyes, mean, median, p95
from cffa_core.evaluation.scores import HIGHER_IS_BETTER, SHIFT

FORMAT = "cffa-alignment/1"
TITLES = {
    "ridge_correlation": "ridge correlation",
    "vessel_dice": "vessel Dice",
    "cl_dice": "vessel clDice",
    "ngf": "NGF similarity",
    "mutual_information": "mutual information",
}
STATISTICS = {"mean": mean, "median": median, "p95": p95}


@dataclass(frozen=True)
class VaeCeiling:
    """What the VAE itself keeps: Dice of each image's vessels before and after a round trip."""

    base: str
    digest: str
    vessel_dice_cf: Estimate
    vessel_dice_fa: Estimate


@dataclass(frozen=True)
class Subject:
    """A scored set and where it came from; ``available`` pairs were there, of which the set is a seeded choice."""

    source: str
    digest: str
    available: int
    scored: ScoredSet


@dataclass(frozen=True)
class AlignmentReport:
    """Alignment of ``pairs``; with ``ceiling`` (real pairs, through the VAE if ``vae`` says so) also normalised.

    ``vae`` without ``ceiling`` is the round trip of the pairs themselves.
    """

    pairs: Subject
    ceiling: Subject | None = None
    vae: VaeCeiling | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: per score the estimates, the floor, the ceiling and A; every pair's own scores."""
        return {
            "format": FORMAT,
            "pairs": self._subject(self.pairs),
            "ceiling": None if self.ceiling is None else self._subject(self.ceiling),
            "vae": self._vae(),
            "scores": {score: self._score(score) for score in HIGHER_IS_BETTER},
            "residual_shift_px": {name: self._shift(name) for name in ("median", "p95")},
            "per_pair": [
                {"name": pair.name, "eye": pair.eye, "true": pair.true, "shuffled": pair.shuffled}
                for pair in self.pairs.scored.pairs
            ],
        }

    def table(self) -> list[dict[str, str]]:
        """Rows with the same keys in order: score, N, true, shuffled, ceiling, ceiling shuffled, A; 95 % intervals."""
        rows = []
        for score in HIGHER_IS_BETTER:
            value, reason = self._normalised(score)
            rows.append(self._row(TITLES[score], score, "mean", shown(value) if value else f"- ({reason})"))
        rows += [self._row(f"residual shift px, {name}", SHIFT, name, "-") for name in ("median", "p95")]
        if self.vae is not None:
            for modality, kept in (("CF", self.vae.vessel_dice_cf), ("FA", self.vae.vessel_dice_fa)):
                row = dict.fromkeys(rows[0], "-")
                title = f"VAE round trip ({self.vae.base}), vessel Dice {modality}"
                rows.append(row | {"score": title, "N": str(kept.n), "ceiling": shown(kept)})
        return rows

    def _row(self, title: str, score: str, statistic: str, last: str) -> dict[str, str]:
        found = self._estimates(score, statistic)
        here = found["true"]
        return {
            "score": title,
            "N": str(here.n if here else 0),
            "true": shown(here),
            "shuffled": shown(found["shuffled"]),
            "ceiling": shown(found["ceiling"]),
            "ceiling shuffled": shown(found["ceiling_shuffled"]),
            "A": last,
        }

    def _estimates(self, score: str, statistic: str) -> dict[str, Estimate | None]:
        found: dict[str, Estimate | None] = {}
        for prefix, subject in (("", self.pairs), ("ceiling", self.ceiling)):
            for shuffled in (False, True):
                key = "_".join(part for part in (prefix, "shuffled" if shuffled else "") if part) or "true"
                found[key] = None
                if subject is not None:
                    found[key] = subject.scored.estimate(score, STATISTICS[statistic], shuffled=shuffled)
        return found

    def _normalised(self, score: str) -> tuple[Estimate | None, str | None]:
        if self.ceiling is None:
            return None, "no reference"
        return normalised(self.pairs.scored, self.ceiling.scored, score)

    def _score(self, score: str) -> dict[str, Any]:
        value, reason = self._normalised(score)
        entry: dict[str, Any] = {key: _json(found) for key, found in self._estimates(score, "mean").items()}
        return entry | {"normalised": _json(value), "normalised_omitted": reason}

    def _shift(self, statistic: str) -> dict[str, Any]:
        return {key: _json(found) for key, found in self._estimates(SHIFT, statistic).items()}

    def _vae(self) -> dict[str, Any] | None:
        if self.vae is None:
            return None
        kept = {"cf": _json(self.vae.vessel_dice_cf), "fa": _json(self.vae.vessel_dice_fa)}
        return {"base": self.vae.base, "digest": self.vae.digest, "vessel_dice": kept}

    @staticmethod
    def _subject(subject: Subject) -> dict[str, Any]:
        scored = subject.scored
        return {
            "source": subject.source,
            "digest": subject.digest,
            "available": subject.available,
            "pairs": len(scored.pairs),
            **counts(scored.whose),
            "not_scored": [pair.name for pair in scored.pairs if pair.true is None],
            "seed": scored.seed,
        }


def counts(whose: Eyes) -> dict[str, Any]:
    """JSON-ready: number of eyes, of known patients if there are any, and what intervals were resampled by."""
    known = whose.known_patients
    if known is None:
        return {"eyes": whose.different, "resampled_by": "eye"}
    return {"eyes": whose.different, "patients": known, "resampled_by": "patient"}


def in_words(whose: Eyes) -> str:
    """``11 eyes``, or ``11 eyes of 7 known patients``."""
    known = "" if whose.known_patients is None else f" of {whose.known_patients} known patients"
    return f"{whose.different} eyes{known}"


def _json(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else value.to_dict()


def shown(value: Estimate | None) -> str:
    """``0.56 [0.47, 0.64]``, with one digit more where all of it is small."""
    if value is None:
        return "-"
    size = max(abs(end) for end in (value.value, value.low, value.high) if end is not None)
    digits = 3 if 0 < size < 0.05 else 2 if size < 10 else 1

    def text(number: float) -> str:
        return f"{round(number, digits) + 0.0:.{digits}f}"  # adding 0.0 takes the sign off a zero

    if value.low is None or value.high is None:
        return text(value.value)
    return f"{text(value.value)} [{text(value.low)}, {text(value.high)}]"

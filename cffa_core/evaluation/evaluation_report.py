"""What the whole evaluation found, as one value: JSON for machines, Markdown and rows of a table for people.

Alignment is a report of its own and is taken in whole; scores of features and of memorisation come from their modules.
Nothing is computed here, and pictures are only named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cffa_core.evaluation.bootstrap import Score
from cffa_core.evaluation.features import SPACES
from cffa_core.evaluation.memorisation import Match, Memorisation
from cffa_core.evaluation.report import AlignmentReport, Subject, counts, in_words, shown

FORMAT = "cffa-evaluation/1"
TITLES = {
    "kid": "KID",
    "fid": "FID",
    "density": "density",
    "coverage": "coverage",
    "vendi": "Vendi",
    "vendi_reference": "Vendi of the reference",
    "flagged_share": "flagged share",
    "auth_pct": "AuthPct",
}
READ = {
    "alignment": "A is 0 at the floor (CF against the FA of another eye) and 1 at the ceiling (real pairs).",
    "fidelity": "KID and FID are distances to the reference: lower is better; KID is near 0 for sets that do not "
    "differ. Compare them only under the same extractor and reference, FID only at the same number of pairs.",
    "diversity": "Density and coverage are about 1 for pairs like the reference; mode collapse lowers coverage. "
    "Vendi is the effective number of different pairs among as many of both sets.",
    "memorisation": "A flagged pair is nearer to a training pair than 95 % of held-out real pairs are, in any of 8 "
    "turns and under small shifts; about 5 % are expected of an honest model. AuthPct is the share of pairs that are "
    "not nearer to their nearest training pair than that one is to its own neighbour.",
}


@dataclass(frozen=True)
class TrainingSet:
    """The training pairs that generated ones were compared with."""

    source: str
    digest: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationReport:
    """Everything measured of one set of pairs against a reference; ``memorisation`` only where ``train`` was given.

    ``extractor`` has name, sha256 and the number of features of ``cf`` and ``fa``; ``fidelity`` and ``diversity`` map a
    measure and a space to a score.
    """

    alignment: AlignmentReport
    reference: Subject
    extractor: dict[str, Any]
    fidelity: dict[str, dict[str, Score]]
    diversity: dict[str, dict[str, Score]]
    train: TrainingSet | None = None
    memorisation: Memorisation | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; every score has ``n``, an interval and ``refused``, the reason if there is no value."""
        alignment = self.alignment.to_dict()
        return {
            "format": FORMAT,
            "pairs": alignment["pairs"],
            "reference": self._reference(),
            "train": self._train(),
            "extractor": self.extractor,
            "alignment": alignment,
            "fidelity": _dicts(self.fidelity),
            "diversity": _dicts(self.diversity),
            "memorisation": self._memorisation(),
        }

    def table(self) -> list[dict[str, str]]:
        """Rows of everything but alignment, with the same keys in order: score, N, CF, FA, joint."""
        rows = []
        for measure, scores in {**self.fidelity, **self.diversity}.items():
            count = str(max(score.n for score in scores.values()))
            rows.append(
                {"score": TITLES[measure], "N": count} | {_head(space): _cell(scores[space]) for space in SPACES}
            )
        if self.memorisation is not None:
            for measure in ("flagged_share", "auth_pct"):
                score: Score = getattr(self.memorisation, measure)
                row = {"score": TITLES[measure], "N": str(score.n), "CF": "-", "FA": "-", "joint": _cell(score)}
                rows.append(row)
        return rows

    def refusals(self) -> list[str]:
        """One line per reason, with the scores that it refused."""
        reasons: dict[str, list[str]] = {}
        found = [(measure, space, scores[space]) for measure, scores in self._measures() for space in scores]
        for measure, space, score in found:
            if score.refused is not None:
                title = TITLES[measure] + (f" {_head(space)}" if space else "")
                reasons.setdefault(score.refused, []).append(title)
        return [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]

    def markdown(self, pictures: dict[str, str]) -> str:
        """The report for people; ``pictures`` maps a section (alignment, pairs, memorisation, neighbours) to a file."""

        def picture(section: str, title: str) -> list[str]:
            return [f"![{title}]({pictures[section]})", ""] if section in pictures else []

        subject, reference = self.alignment.pairs, self._reference()
        extractor, real_eyes = self.extractor, in_words(self.reference.scored.whose)
        lines = [f"# Evaluation of {subject.source}", "", *_sets(subject, self.reference, self.train), ""]
        lines += [
            f"Intervals are 95 %, {self._resampled()}. A score with too few pairs behind it is refused, with the "
            "reason below.",
            "",
        ]
        lines += ["## Alignment", "", READ["alignment"], "", *_markdown_table(self.alignment.table()), ""]
        lines += picture("alignment", "Alignment scores of each pair") + picture(
            "pairs", "Best, median and worst pairs"
        )
        of_features = [row for row in self.table() if row["score"] not in (TITLES["flagged_share"], TITLES["auth_pct"])]
        lines += ["## Fidelity and diversity", "", f"{READ['fidelity']} {READ['diversity']}", ""]
        lines += [
            f"Extractor `{extractor['name']}` ({extractor['cf']} features of CF, {extractor['fa']} of FA), "
            f"SHA-256 `{extractor['sha256'][:16]}`; reference of {reference['pairs']} pairs, {real_eyes}.",
            "",
            *_markdown_table(of_features),
            "",
        ]
        lines += ["## Memorisation", ""]
        if self.memorisation is None:
            lines += ["Not measured: the training pairs were not named.", ""]
        else:
            lines += [READ["memorisation"], "", *_markdown_table(self._memorisation_rows()), ""]
            lines += picture("memorisation", "Distance to the nearest training pair")
            lines += picture("neighbours", "Nearest training pairs beside the generated ones")
        refused = self.refusals()
        if refused:
            lines += ["## Refused", "", *(f"- {line}" for line in refused), ""]
        return "\n".join(lines)

    def _measures(self) -> list[tuple[str, dict[str, Score]]]:
        found = [*self.fidelity.items(), *self.diversity.items()]
        if self.memorisation is not None:
            found += [("flagged_share", {"": self.memorisation.flagged_share})]
            found += [("auth_pct", {"": self.memorisation.auth_pct})]
        return found

    def _memorisation_rows(self) -> list[dict[str, str]]:
        assert self.memorisation is not None
        assert self.train is not None
        rows = []
        for measure in ("flagged_share", "auth_pct"):
            score: Score = getattr(self.memorisation, measure)
            row = {"score": TITLES[measure], "N": str(score.n), "value": _cell(score)}
            rows.append(row | {"training pairs": str(len(self.train.names))})
        return rows

    def _reference(self) -> dict[str, Any]:
        subject = self.reference
        scored = subject.scored
        found = {"source": subject.source, "digest": subject.digest, "available": subject.available}
        return found | {"pairs": len(scored.pairs), **counts(scored.whose)}

    def _resampled(self) -> str:
        sets = {"the pairs": self.alignment.pairs, "the reference": self.reference}
        by = [name for name, found in sets.items() if found.scored.whose.known_patients is not None]
        if not by:
            return "over eyes"
        return f"over patients of {' and '.join(by)}, where they are known, and over eyes elsewhere"

    def _train(self) -> dict[str, Any] | None:
        if self.train is None:
            return None
        return {"source": self.train.source, "digest": self.train.digest, "pairs": len(self.train.names)}

    def _memorisation(self) -> dict[str, Any] | None:
        found, train = self.memorisation, self.train
        if found is None or train is None:
            return None

        def match(name: str, near: Match) -> dict[str, Any]:
            place = {"turn": near.turn, "shift": [round(part, 4) for part in near.shift]}
            return {"name": name, "train": train.names[near.index], "distance": round(near.distance, 6), **place}

        ours = [pair.name for pair in self.alignment.pairs.scored.pairs]
        real = [pair.name for pair in self.reference.scored.pairs]
        zipped = zip(ours, found.generated, found.flagged, strict=True)
        return {
            "flagged_share": found.flagged_share.to_dict(),
            "auth_pct": found.auth_pct.to_dict(),
            "threshold": None if found.threshold is None else round(found.threshold, 6),
            "reference_pairs_in_training": found.copies,
            "generated": [match(name, near) | {"flagged": flag} for name, near, flag in zipped],
            "held_out": [match(name, near) for name, near in zip(real, found.held_out, strict=True)],
        }


def _dicts(measures: dict[str, dict[str, Score]]) -> dict[str, Any]:
    return {measure: {space: s.to_dict() for space, s in scores.items()} for measure, scores in measures.items()}


def _head(space: str) -> str:
    return space if space == "joint" else space.upper()


def _cell(score: Score) -> str:
    return "refused" if score.refused is not None else shown(score.estimate)


def _sets(subject: Subject, reference: Subject, train: TrainingSet | None) -> list[str]:
    rows = []
    for role, found in (("pairs", subject), ("reference", reference)):
        count = str(len(found.scored.pairs))
        if found.available > len(found.scored.pairs):
            count += f" of {found.available}"
        row = {
            "set": role,
            "source": f"`{found.source}`",
            "N": count,
            "eyes": in_words(found.scored.whose).replace(" eyes", ""),
        }
        rows.append(row | {"digest": f"`{found.digest[:12]}`"})
    if train is not None:
        row = {"set": "training", "source": f"`{train.source}`", "N": str(len(train.names)), "eyes": "-"}
        rows.append(row | {"digest": f"`{train.digest[:12]}`"})
    return _markdown_table(rows)


def _markdown_table(rows: list[dict[str, str]]) -> list[str]:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(row[head].replace("|", "\\|") for head in heads) + " |" for row in rows)]

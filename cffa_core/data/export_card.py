"""The documents of an exported data set: Croissant JSON-LD for programs, a data card (README.md) for people.

Only what is known is said: a licence that nobody gave and a date that nobody asked for are left out. Croissant is the
format of MLCommons, version 1.0 (Akhtar et al. 2024, https://docs.mlcommons.org/croissant/docs/croissant-spec.html).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cffa_core.data.export_source import NOT_STATED, ExportPair

CROISSANT, CARD = "croissant.json", "README.md"
SHOWN_SIZES = 10
SIZE_CLASSES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
# The context that the specification asks for, word for word.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
FIELDS = {"name": "sc:Text", "eye": "sc:Text", "width": "sc:Integer", "height": "sc:Integer"}
MEANING = {
    "cf": "colour fundus photograph, RGB",
    "fa": "fluorescein angiography, one channel, on the CF's pixel grid",
    "valid_cf": "white where the CF's camera saw the eye",
    "valid_fa": "white where the FA's camera saw the eye",
    "fov_cf": "white where the CF's camera saw the eye",
    "fov_fa": "white where the FA's camera saw the eye",
}


@dataclass
class Summary:
    """What the documents say about the pairs; counted while they pass."""

    title: str
    kind: str
    digest: str
    origin: Mapping[str, Any]
    licence: str | None
    pairs: int = 0
    eyes: set[str] = field(default_factory=set)
    patients: set[str] = field(default_factory=set)
    sizes: Counter[str] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)
    registrations: Counter[str] = field(default_factory=Counter)

    def add(self, item: ExportPair) -> None:
        """Count one pair."""
        self.pairs += 1
        self.eyes.add(item.pair.eye)
        self.patients.update([item.pair.patient] if item.pair.patient is not None else [])
        self.sizes[f"{item.pair.width}x{item.pair.height}"] += 1
        self.registrations[item.pair.registration] += 1
        self.masks.update(item.masks.keys())

    def report(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "title": self.title,
            "format": self.kind,
            "pairs": self.pairs,
            "eyes": len(self.eyes),
            "sizes": dict(self.sizes.most_common()),
            "masks": dict(sorted(self.masks.items())),
            "registration": dict(sorted(self.registrations.items())),
            "digest": self.digest,
            "origin": dict(self.origin),
            "licence": self.licence,
        }


@dataclass(frozen=True)
class Images:
    """One kind of image in Croissant's terms: its files, and which of their properties tells the pair.

    ``source`` finds it (``{"extract": ..., "transform": ...}``); it equals the field ``refers`` of the pair.
    """

    kind: str
    includes: str
    source: Mapping[str, Any]
    refers: str


def croissant(
    summary: Summary,
    index: tuple[str, bytes],
    fields: Mapping[str, str],
    images: Sequence[Images],
    *,
    archives: Mapping[str, str] | None = None,
) -> bytes:
    """The Croissant document of an export.

    ``index`` is the name and content of the JSON file whose ``pairs`` list has the ``fields`` (name -> type);
    ``archives`` maps the tar files that hold the images, if any do, to their SHA-256.
    """
    name, content = index
    files = {name: ("application/json", hashlib.sha256(content).hexdigest())}
    files |= {tar: ("application/x-tar", digest) for tar, digest in (archives or {}).items()}
    contained = {"containedIn": [{"@id": tar} for tar in archives]} if archives else {}
    distribution: list[dict[str, Any]] = [
        {"@type": "cr:FileObject", "@id": file, "name": file, "contentUrl": file, "encodingFormat": kind, "sha256": sha}
        for file, (kind, sha) in files.items()
    ]
    distribution += [
        {
            "@type": "cr:FileSet",
            "@id": f"{each.kind}-images",
            "description": MEANING.get(each.kind, f"white where the annotation {each.kind} is"),
            **contained,
            "encodingFormat": "image/png",
            "includes": each.includes,
        }
        for each in images
    ]
    document: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": summary.title,
        "description": _description(summary),
        **({"license": summary.licence} if summary.licence else {}),
        "distribution": distribution,
        "recordSet": [_pair_records(name, fields), *(_image_records(each) for each in images)],
    }
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _pair_records(index: str, fields: Mapping[str, str]) -> dict[str, Any]:
    found = [
        {
            "@type": "cr:Field",
            "@id": f"pairs/{name}",
            "dataType": kind,
            "source": {"fileObject": {"@id": index}, "extract": {"jsonPath": f"$.pairs[*].{name}"}},
        }
        for name, kind in fields.items()
    ]
    return {"@type": "cr:RecordSet", "@id": "pairs", "key": {"@id": "pairs/name"}, "field": found}


def _image_records(images: Images) -> dict[str, Any]:
    files = {"fileSet": {"@id": f"{images.kind}-images"}}
    pair = {
        "@type": "cr:Field",
        "@id": f"{images.kind}/{images.refers}",
        "dataType": "sc:Text",
        "source": {**files, **images.source},
        "references": {"field": {"@id": f"pairs/{images.refers}"}},
    }
    image = {
        "@type": "cr:Field",
        "@id": f"{images.kind}/image",
        "dataType": "sc:ImageObject",
        "source": {**files, "extract": {"fileProperty": "content"}},
    }
    return {"@type": "cr:RecordSet", "@id": images.kind, "field": [pair, image]}


def _description(summary: Summary) -> str:
    made = {
        "generated": "drawn by a generative model; no patient is in them",
        "real": "of real eyes",
        "procedural": "drawn by a program; no patient is in them",
    }.get(str(summary.origin["kind"]), "of an origin that is not stated")
    model = summary.origin.get("model_digest")
    return (
        f"{summary.pairs} registered pairs of colour fundus photograph (CF) and fluorescein angiography (FA), {made}."
        + (f" Model: SHA-256 {model}." if model else "")
    )


def card(summary: Summary, contents: str) -> bytes:
    """The data card: YAML front matter (strings as JSON, which YAML reads), then what a reader wants to know."""
    size = next((name for limit, name in SIZE_CLASSES if summary.pairs < limit), "n>1M")
    report = summary.report()
    stated = {key: value for key, value in report.items() if key not in ("title", "licence")}
    front = [
        "---",
        f"pretty_name: {json.dumps(summary.title)}",
        *([f"license: {json.dumps(summary.licence)}"] if summary.licence else []),
        f"size_categories: {json.dumps([size])}",
        'tags: ["medical", "ophthalmology", "fundus-photography", "fluorescein-angiography", "image-registration"]',
        f"cffa: {json.dumps(stated, sort_keys=True)}",
        "---",
    ]
    sizes = [f"{count} of {name}" for name, count in summary.sizes.most_common(SHOWN_SIZES)]
    more = len(summary.sizes) - SHOWN_SIZES
    masks = [f"{token} ({count} pairs)" for token, count in sorted(summary.masks.items())]
    body = [
        f"# {summary.title}",
        "",
        _description(summary),
        "",
        f"- Pairs: {summary.pairs}, of {len(summary.eyes)} eyes. Never split the pairs of one eye.",
        *([f"- Known patients: {len(summary.patients)}. Never split the eyes of one."] if summary.patients else []),
        f"- Sizes in pixels: {', '.join(sizes)}{f' and {more} other sizes' if more > 0 else ''}",
        f"- Registration: {', '.join(f'{kind} ({n})' for kind, n in sorted(summary.registrations.items()))}; "
        "`given` pairs came registered, the others were registered from landmarks",
        f"- Annotation masks: {', '.join(masks) or 'none'}",
        f"- Digest of names, eyes, pixels and valid regions: `{summary.digest}`",
        f"- Licence: {summary.licence or 'not stated; ask whoever gave you the data before you use or pass it on'}",
        "",
        "## Origin",
        "",
        *_origin(summary.origin),
        "",
        "## Contents",
        "",
        contents,
    ]
    return ("\n".join([*front, "", *body]) + "\n").encode()


def _origin(origin: Mapping[str, Any]) -> list[str]:
    if origin["kind"] == NOT_STATED:
        return ["Not stated: whoever exported the pairs did not say whether they are real or generated."]
    lines = [f"- Kind: {origin['kind']}"]
    if "model_digest" in origin:
        lines.append(f"- Model: SHA-256 `{origin['model_digest']}`")
    spec = origin.get("spec")
    if isinstance(spec, Mapping):
        if "seed" in spec:
            lines.append(f"- Seed of the whole set: {spec['seed']}; each pair's own seed stands with the pair")
        lines.append(f"- Specification: `{json.dumps(spec, sort_keys=True)}`")
    if "numerics_key" in origin:
        lines.append(f"- Numerics key: `{origin['numerics_key']}`")
    return lines

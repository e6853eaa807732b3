"""The labelling interface of a Label Studio project, XML → its brush, its image, and which label means which class."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat

from pipeline.core.labels import LabelSpace
from pipeline.mask_files import BrushTag

HINT = "paste labels.xml of the export format label_studio into the project's labelling interface (docs/exports.md)"


@dataclass(frozen=True)
class Interface:
    """brush: what paints the classes; image_key: the key of a task's `data` that holds its image."""

    brush: BrushTag
    image_key: str


def default_interface(labels: LabelSpace) -> Interface:
    """That of the export format label_studio."""
    return Interface(BrushTag("tag", "image", dict(enumerate(labels.names, 1))), "image")


def read_interface(xml: str, labels: LabelSpace) -> Interface:
    """The first <BrushLabels> on an <Image> that has a label of a class; other labels are left to the annotators.

    A label means the class that its `value` names, or those that its `predicted_values` names, separated by commas.
    ValueError where the text is no XML, has a document type (entities can grow without end), or no such brush.
    """
    brushes, images = _elements(xml)
    on_images = [brush for brush in brushes if brush.to_name in images]
    if not on_images:
        raise ValueError(f"the labelling interface has no <BrushLabels> on an <Image>; {HINT}")
    for brush in on_images:
        painted = {value: label for value, name in enumerate(labels.names, 1) if (label := brush.label_of(name)) is not None}
        if painted:
            return Interface(BrushTag(brush.name, brush.to_name, painted), images[brush.to_name])
    there = ", ".join(label for brush in on_images for label in brush.labels)
    raise ValueError(
        f"no label of the labelling interface ({there or 'none'}) is a class of the segmenter ({', '.join(labels.names)}); "
        f'name the classes in predicted_values="…" of the labels, or {HINT}'
    )


@dataclass
class _Brush:
    """labels: their values → the names of predictions that they stand for."""

    name: str
    to_name: str
    labels: dict[str, list[str]] = field(default_factory=dict)

    def label_of(self, name: str) -> str | None:
        if name in self.labels:
            return name
        return next((label for label, predicted in self.labels.items() if name in predicted), None)


def _elements(xml: str) -> tuple[list[_Brush], dict[str, str]]:
    """The brushes, and the data keys of images by the names of their elements. Names of elements may be in any case."""
    brushes: list[_Brush] = []
    images: dict[str, str] = {}
    inside: list[str] = []

    def start(element: str, attributes: dict[str, str]) -> None:
        inside.append(element.lower())
        if inside[-1] == "image":
            images[attributes.get("name", "")] = attributes.get("value", "").removeprefix("$")
        elif inside[-1] == "brushlabels":
            brushes.append(_Brush(attributes.get("name", ""), attributes.get("toName", "")))
        elif inside[-1] == "label" and "brushlabels" in inside:
            predicted = [name.strip() for name in attributes.get("predicted_values", "").split(",")]
            brushes[-1].labels[attributes.get("value", "")] = predicted

    def end(element: str) -> None:
        inside.pop()

    def refuse(*declaration: object) -> None:
        raise ValueError("the labelling interface has a <!DOCTYPE …>, which is refused; remove it")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.StartDoctypeDeclHandler = start, end, refuse
    try:
        parser.Parse(xml, True)
    except expat.ExpatError as error:
        raise ValueError(f"the labelling interface is no XML: {error}") from None
    return brushes, images

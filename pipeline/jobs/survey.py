"""A data set, by its lists and the headers of its image files → what it looks like, and what is likely to go wrong with it.

Nothing is decoded: `init` asks before there is a project, and prepare before it opens any image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from PIL import Image

from pipeline import class_names
from pipeline.core.contracts import DatasetWithWarnings, Listing
from pipeline.core.labels import LabelSpace
from pipeline.core.problems import listed, quantity
from pipeline.core.records import read_file
from pipeline.core.sections import Dataset
from pipeline.jobs.listings import list_images, open_dataset
from pipeline.listing import DatasetError

FEW = 20  # train images under which a class is named
SMALL, LARGE = 64, 4096  # px of the short and of the long side
NAMED = 10  # classes or ids that a text names

Size = tuple[int, int]  # (H, W) px


@dataclass(frozen=True)
class ClassCount:
    """Images that have a class as a tag: of split train, of split val, and of train with no other tag beside it."""

    name: str
    train: int
    val: int
    alone: int


@dataclass(frozen=True)
class Sizes:
    """(long side, short side) px of the smallest, the median and the largest image, by area."""

    smallest: Size
    median: Size
    largest: Size


@dataclass(frozen=True)
class Survey:
    """What a data set looks like.

    train, val          images of the splits
    tagged              images with tags, the negatives among them
    negatives           images of split train that were looked at and show no class: their tags cell is empty
    masks               images with a mask, for evaluation
    classes             in the order of mask values
    sizes               None where no image was looked at
    warnings            a text per likely mistake, with its cure
    """

    train: int
    val: int
    tagged: int
    negatives: int
    masks: int
    classes: tuple[ClassCount, ...]
    sizes: Sizes | None
    warnings: tuple[str, ...]

    @property
    def images(self) -> int:
        return self.train + self.val

    def lines(self) -> list[str]:
        """What it looks like, in words, without the warnings."""
        counts = [
            f"{self.tagged:,} tagged", f"{self.images - self.tagged:,} untagged",
            f"{self.negatives:,} of train without any class", f"{self.masks:,} with a mask",
        ]  # fmt: skip
        by_images = sorted(self.classes, key=lambda count: (-count.train, count.name))
        names = [f"{count.name} {count.train:,} + {count.val:,}" for count in by_images]
        lines = [
            f"{quantity(self.images, 'image')} ({self.train:,} train, {self.val:,} val): {', '.join(counts)}",
            f"{quantity(len(self.classes), 'class', 'classes')} (images of train + val): {listed(names, ', ')}",
        ]
        if self.sizes is not None:
            smallest, median, largest = (f"{w} × {h}" for w, h in _fields(self.sizes))
            lines.append(f"sizes (long × short side): {smallest} to {largest} px, median {median}")
        return lines


def _fields(sizes: Sizes) -> tuple[Size, Size, Size]:
    return sizes.smallest, sizes.median, sizes.largest


def of(root: Path, dataset: Dataset) -> Survey:
    """Of the data set in folder `root`, whatever dataset.root says; opens the header of every image file.

    DatasetError with every problem of lists, ids, names and tags; ParamsError on wrong dataset.options.
    """
    opened = open_dataset(replace(dataset, root=str(root)))
    listings, problems = list_images(opened)
    if problems:
        raise DatasetError(problems, listings=listings)
    return of_listings(listings, opened.labels, dataset_warnings(opened), dict(_header_sizes(listings, root)))


def dataset_warnings(dataset: object) -> Sequence[str]:
    """What the data set itself has to say."""
    return dataset.warnings if isinstance(dataset, DatasetWithWarnings) else ()


def _header_sizes(listings: Iterable[Listing], root: Path) -> Iterator[tuple[str, Size]]:
    """(id, size) by the headers of the files, not turned by EXIF. Broken files are left out: prepare names them."""
    for listing in listings:
        try:
            with Image.open(root / listing.path if listing.length is None else BytesIO(read_file(listing, root))) as image:
                yield listing.id, (image.height, image.width)
        except Exception:  # Pillow raises many kinds of errors on broken files
            continue


def of_listings(
    listings: Sequence[Listing], labels: LabelSpace, known: Sequence[str] = (), sizes: Mapping[str, Size] | None = None
) -> Survey:
    """From lists alone. known: warnings that are known already; sizes: (H, W) px by id, or None where no file was opened."""
    train = [listing for listing in listings if listing.split == "train"]
    counts = _class_counts(listings, labels)
    warnings = [*known, *class_names.warnings({count.name: count.train + count.val for count in counts})]
    warnings += _tag_warnings(train, counts)
    if len(train) == len(listings):
        warnings.append(
            "no image is of split val: nothing will say how the segmenter does on images that it has not seen; give some "
            "rows the split val, or set dataset.options.val_share to 0.2"
        )
    if sizes:
        warnings += size_warnings(sizes.items())
    return Survey(
        train=len(train),
        val=len(listings) - len(train),
        tagged=sum(listing.tags is not None for listing in listings),
        negatives=sum(listing.tags == () for listing in train),
        masks=sum(listing.mask for listing in listings),
        classes=counts,
        sizes=sizes_of(sizes.values()) if sizes else None,
        warnings=tuple(warnings),
    )


def _class_counts(listings: Iterable[Listing], labels: LabelSpace) -> tuple[ClassCount, ...]:
    counts: Counter[tuple[str, str]] = Counter()
    for listing in listings:
        tags = set(listing.tags or ())
        counts.update((listing.split, tag) for tag in tags)
        if len(tags) == 1 and listing.split == "train":
            counts.update(("alone", tag) for tag in tags)
    return tuple(
        ClassCount(name, counts["train", name], counts["val", name], counts["alone", name]) for name in labels.names
    )


def _tag_warnings(train: Sequence[Listing], counts: Sequence[ClassCount]) -> list[str]:
    """What the tags of the train images will not teach."""
    tagged = sum(listing.tags is not None for listing in train)
    everywhere = [count.name for count in counts if count.train == tagged > 0]
    cure = "add images that do not show it (without any class: an empty tags cell)"
    warnings = []
    if everywhere and len(counts) == 1:
        warnings.append(
            f"the only class, {everywhere[0]!r}, is on every train image: nothing shows what is not {everywhere[0]!r}, so "
            f"score maps cannot learn it, and masks will lie anywhere; {cure}, about as many as there are with it"
        )
    else:
        warnings += [
            f"class {name!r} is on every tagged train image, so nothing shows what is not; {cure}" for name in everywhere
        ]
    few = [f"{count.name} {count.train}" for count in sorted(counts, key=lambda count: count.train) if count.train < FEW]
    if few:
        warnings.append(
            f"{quantity(len(few), 'class has', 'classes have')} fewer than {FEW} train images, too few to learn much: "
            f"{listed(few, ', ', NAMED)}; add images, or remove the class"
        )
    never_alone = [count.name for count in counts if count.train and not count.alone]
    if never_alone:
        warnings.append(
            f"{quantity(len(never_alone), 'class is', 'classes are')} on no train image alone, and may be taken for what is "
            f"beside {'it' if len(never_alone) == 1 else 'them'}: {listed(never_alone, ', ', NAMED)}"
        )
    return warnings


def size_warnings(sizes: Iterable[tuple[str, Size]]) -> list[str]:
    """Of photographs that are smaller or larger than methods are made for. sizes: (id, (H, W) px)."""
    small, large = list[str](), list[str]()
    for image_id, size in sizes:
        if min(size) < SMALL:
            small.append(repr(image_id))
        if max(size) > LARGE:
            large.append(repr(image_id))
    warnings = []
    if small:
        warnings.append(
            f"{quantity(len(small), 'image')} with a side under {SMALL} px, too small for a network to see much: "
            f"{listed(small, ', ', NAMED)}"
        )
    if large:
        warnings.append(
            f"{quantity(len(large), 'image')} with a side over {LARGE} px, slow to read again and again: "
            f"{listed(large, ', ', NAMED)}; scale them down (ImageMagick: `mogrify -resize 2048x2048\\> *.jpg` on a copy)"
        )
    return warnings


def sizes_of(sizes: Iterable[Size]) -> Sizes:
    """Of at least one image."""
    by_area = sorted(((max(size), min(size)) for size in sizes), key=lambda size: (size[0] * size[1], size))
    return Sizes(by_area[0], by_area[len(by_area) // 2], by_area[-1])

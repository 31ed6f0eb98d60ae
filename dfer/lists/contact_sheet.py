"""The contact sheet of a list, for scripts/check_list.py."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dfer.files import write_whole
from dfer.images import open_image, upright
from dfer.lists.annotations import EMOTIONS
from dfer.lists.checking import Clip, Folder, length_bins


def draw_contact_sheet(path: Path, clips: Sequence[Clip], folders: Sequence[Folder]) -> None:
    """Draw clips of each class by first, middle and last frame, and histograms of classes and lengths, as a PNG file.

    Raises:
        OSError: if it cannot be written.
    """
    tile, per_class, margin, gap = 96, 4, 110, 12
    font = ImageFont.load_default()
    width = margin + per_class * (3 * tile + gap)
    row_height = tile + 22
    sheet = Image.new("RGB", (width, len(EMOTIONS) * row_height + 160), "white")
    pen = ImageDraw.Draw(sheet)
    pairs = [pair for pair in zip(clips, folders, strict=True) if pair[1].samples]
    counts = [sum(clip.row.label == label for clip in clips) for label in range(len(EMOTIONS))]
    for label, emotion in enumerate(EMOTIONS):
        top = label * row_height + 4
        pen.text((8, top + tile // 3), f"{label} {emotion}\n{counts[label]:,} clips", "black", font)
        own = [pair for pair in pairs if pair[0].row.label == label]
        chosen = [own[i * len(own) // per_class] for i in range(per_class)] if len(own) > per_class else own
        for column, (clip, folder) in enumerate(chosen):
            left = margin + column * (3 * tile + gap)
            for number, name in enumerate(folder.samples):
                box = (left + number * tile, top, left + (number + 1) * tile - 1, top + tile - 1)
                try:
                    with warnings.catch_warnings(action="ignore"), open_image(os.path.join(clip.path, name)) as image:
                        image.draft("RGB", (tile, tile))
                        sheet.paste(upright(image).resize((tile, tile)), box[:2])
                except Exception:  # as in `inspect`, which names it
                    pen.rectangle(box, "lightgrey")
                    pen.line(box, "red")
            caption = f"{clip.name} ({folder.num_frames})".encode("ascii", "replace").decode()
            pen.text((left, top + tile + 2), caption[-46:], "grey", font)
    lengths = [folder.num_frames for folder in folders if folder.num_frames]
    bars = [(emotion, counts[label]) for label, emotion in enumerate(EMOTIONS)]
    spans = [(f"{low}-{high}", number) for low, high, number in length_bins(lengths)] if lengths else []
    for left, title, chart in ((8, "clips per class", bars), (width // 2, "clips by frames", spans)):
        top = len(EMOTIONS) * row_height + 16
        pen.text((left, top), title, "black", font)
        for number, (name, value) in enumerate(chart):
            y = top + 20 + 16 * number
            longest = max(value for _, value in chart)
            pen.text((left, y), name, "black", font)
            pen.rectangle((left + 80, y, left + 80 + 300 * value // longest, y + 11), "steelblue")
            pen.text((left + 388, y), f"{value:,}", "black", font)
    write_whole(path, lambda file: sheet.save(file, "PNG"))

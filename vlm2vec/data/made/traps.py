"""What makes the real rows hard to read, and in which set it stands. Tables only: `sets` and `write` follow them.

Traps that need no table: ImageNet_1K (training) against ImageNet-1K (evaluation); placeholders of queries without a picture, doubled and
missing newlines and "to to" come with the templates of the suite; lists with repeats, also of the gold, come about where a set has fewer
distinct candidates than a list is long; identical positives come about where there are few classes.
"""

from __future__ import annotations

# A set that shows the pictures of another. With scenes they are the same files, else the same bytes under another name.
HOMES = {"MSCOCO_t2i": "MSCOCO_i2t", "VisualNews_t2i": "VisualNews_i2t", "RefCOCO-Matching": "RefCOCO", "Visual7W-Pointing": "Visual7W"}

# How query pictures 0, 8, 16, ... are encoded, by evaluation set; the training set that belongs to it does the same.
ENCODED = {
    "ImageNet-1K": "grey",
    "HatefulMemes": "cmyk",
    "VOC2007": "palette",
    "SUN397": "sixteen-bit",
    "N24News": "turned",
    "ChartQA": "misnamed",
    "OK-VQA": "upper-case",
    "Place365": "sixteen-bit",
    "ImageNet-A": "grey",
    "ImageNet-R": "cmyk",
    "Country211": "palette",
    "VizWiz": "turned",
    "TextVQA": "misnamed",
    "ScienceQA": "upper-case",
}
ENCODED_EVERY = 8

# File names, by evaluation set; others are <SET>_image_<number>
FILES = {
    "ImageNet-1K": "image_{number}",
    "CIRR": "train-{number}-2-img1",
    "WebQA": "{number:08}",
    "RefCOCO": "COCO_train2014_{number:012}",
    "MSCOCO": "{number:06}",
}
CROP_FILE = "{number}_object_{words}"
FIRST_CROP = 558840

ANSWERS = {"HatefulMemes": ("Yes", "No")}  # names of classes that are not their words
LONG_QUERY = {"N24News", "DocVQA"}  # row 0
LONG_TARGET = {"OVEN"}  # candidate 0
PADDED = {"VizWiz"}  # every third question ends in a space
NULL_PATHS = {"GQA", "Country211"}  # tgt_img_path holds nulls instead of ""

# Training sets: without columns of negatives, with empty ones, and with pictures that have no text
NO_NEGATIVE_COLUMNS = {"NIGHTS", "SUN397"}
EMPTY_NEGATIVES = {"ImageNet_1K", "CIRR", "WebQA", "MSCOCO"}
BARE_NEGATIVES = {"VisDial"}

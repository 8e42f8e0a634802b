"""COCO's 80 detection classes and their split into base and novel classes."""

from __future__ import annotations

# By category id, ten a line: "bottle" is 44. COCO leaves the ids of the dashes unused.
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, -, stop sign, parking meter, bench, bird, cat, dog, horse, sheep,
cow, elephant, bear, zebra, giraffe, -, backpack, umbrella, -, -,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
skateboard, surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon,
bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, -, dining table, -, -, toilet,
-, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster,
sink, refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""

# Category id to name, as in the annotation files.
COCO_CLASSES: dict[int, str] = {
    number: name
    for number, name in enumerate(map(str.strip, _NAMES.split(",")), start=1)
    if name != "-"
}

# The classes that PASCAL VOC has too: novel in few-shot detection (arXiv 2003.06957).
NOVEL_CATEGORY_IDS = (1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 44, 62, 63, 64, 67, 72)

ALL_CATEGORY_IDS = tuple(COCO_CLASSES)
BASE_CATEGORY_IDS = tuple(i for i in COCO_CLASSES if i not in NOVEL_CATEGORY_IDS)

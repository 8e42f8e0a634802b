"""One training loader of detectron2 or d2go for any number of processes.

``from_upstream`` takes a loader apart, ``batches`` says which images each virtual rank gets,
``mapping`` makes samples of them and ``loader`` hands them out, one optimizer step an item.
"""

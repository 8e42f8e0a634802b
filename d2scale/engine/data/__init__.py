"""From a dataset's name to samples: catalog, COCO reading, transforms and loaders.

Importing this package needs neither torch nor numpy; its modules do.
"""

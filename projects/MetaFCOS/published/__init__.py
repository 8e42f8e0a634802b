"""The published runs as data: one JSON file a source."""

"""A small procedural world of coloured shapes: scenes, captions, edits, and two independent scorers."""

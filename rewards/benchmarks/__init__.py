"""GenEval, DPG-Bench, GEdit-Bench and ImgEdit: readers of their data, their picture folders, and their tables."""

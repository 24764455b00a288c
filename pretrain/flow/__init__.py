"""Flow matching at scale: kontext, align, unified under DeepSpeed; see ../README.md."""

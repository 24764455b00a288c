"""The ground floor: files, recipes, logs, statistics, seeds, prompts, pictures; nothing here knows a model."""

__version__ = "0.1.0"

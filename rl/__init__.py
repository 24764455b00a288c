"""Flow-GRPO training: objective, learner, controller, stages. Importing it loads neither torch nor ray."""

__version__ = "0.1.0"

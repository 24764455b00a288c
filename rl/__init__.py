"""Flow-GRPO training: objective, learner, controller, stages. Importing this package loads neither torch nor ray."""

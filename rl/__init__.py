"""Flow-GRPO training: objective, learner, controller, stages. Importing it loads neither torch nor ray."""

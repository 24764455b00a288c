"""The models shared by pre-training, rollouts and the learner."""

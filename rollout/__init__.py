"""Rollouts of flow-matching models: SDE steps, trajectories, prompt sets, Ray workers."""

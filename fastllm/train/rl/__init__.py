"""Reinforcement learning: rollouts, advantages, objectives, the steps that they make."""

"""Tuning: candidates checked against the reference, timed in a worker process, proposed by Optuna, all kept."""

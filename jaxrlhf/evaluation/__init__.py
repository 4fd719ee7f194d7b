"""Judgement: outside judges, win rates, reward-model accuracy, over-optimisation, and the report a person reads."""

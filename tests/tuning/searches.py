"""A search whose objective is a formula: its score is highest at OPTIMUM."""

import numpy as np

from sdjax.merging.methods.registry import algorithm
from sdjax.tuning.search import Evaluations
from sdjax.tuning.types import Parameter, Tunable

OPTIMUM = np.array([0.8, -0.3])


def tunable(count=2, start=0.0):
    names = [f"weight[expert_{i + 1}]" for i in range(count)]
    return Tunable(
        name="test",
        slots=tuple(f"expert_{i + 1}" for i in range(count)),
        parameters=tuple(Parameter(name=n, start=start, low=-1.0, high=1.0) for n in names),
        bind=lambda values: algorithm("task_arithmetic", weight=tuple(values)),
        write=lambda values: f"{list(values)}\n",
        suffix=".py",
    )


class Objective:
    """Counts what it computes."""

    def __init__(self):
        self.evaluated = self.stepped = 0

    def evaluate(self, values):
        self.evaluated += 1
        score = 1 - float(np.mean(np.abs(values - OPTIMUM[: len(values)])))
        return {"score": score, "strict": "01", "flexible": "11", "finite": True, "tokens": 5}

    def loss_and_gradient(self, values, start, step):
        self.stepped += 1
        error = values - OPTIMUM[: len(values)]
        return float(np.sum(error**2)), 2 * error

    def evaluations(self, config, trace):
        return Evaluations(self.evaluate, config.budget, trace)

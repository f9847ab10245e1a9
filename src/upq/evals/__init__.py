"""How good a model still is: on text (perplexity, distance from the teacher), on tasks, and how small."""

from upq.evals.size import ModelSize, model_size, weights_bytes
from upq.evals.tasks import evaluate_tasks
from upq.evals.text import TextMetrics, evaluate_text

__all__ = ["ModelSize", "TextMetrics", "evaluate_tasks", "evaluate_text", "model_size", "weights_bytes"]

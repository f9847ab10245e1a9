"""Quality of a model: on text (perplexity, distance from the teacher), on tasks, and its size."""

from upq.artifact.size import ModelSize, model_size, weights_bytes
from upq.evals.tasks import evaluate_tasks
from upq.evals.text import Streamed, TextMetrics, evaluate_text, streamed

__all__ = [
    "ModelSize",
    "Streamed",
    "TextMetrics",
    "evaluate_tasks",
    "evaluate_text",
    "model_size",
    "streamed",
    "weights_bytes",
]

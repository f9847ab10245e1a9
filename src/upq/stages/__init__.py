"""The steps of a run. A kind of stage is one file: `upq.stages.<kind>` registers it."""

from upq.stages._base import STAGES, Demands, Job, Memory, ModelState, Reading, Stage

__all__ = ["STAGES", "Demands", "Job", "Memory", "ModelState", "Reading", "Stage"]

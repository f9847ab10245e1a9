"""The steps of a run. A kind of stage is one file: `upq.stages.<kind>` registers it."""

from upq.stages._base import STAGES, Demands, Job, Memory, ModelState, Planned, Reading, Stage

__all__ = ["STAGES", "Demands", "Job", "Memory", "ModelState", "Planned", "Reading", "Stage"]

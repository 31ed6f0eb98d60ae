"""Which frames a clip has and what is done to them: `from dfer.plan import ClipSampler`."""

from dfer.plan.sampling import ClipSampler

__all__ = ["ClipSampler"]

"""What trained models see in videos, frame by frame."""

from dfer.predict.predictor import Predictor

__all__ = ["Predictor"]

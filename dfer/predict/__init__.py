"""What trained models see in videos, frame by frame: `from dfer.predict import Predictor`."""

from dfer.lists.annotations import EMOTIONS
from dfer.predict.api import Predictor
from dfer.predict.predictor import VideoPrediction

__all__ = ["EMOTIONS", "Predictor", "VideoPrediction"]

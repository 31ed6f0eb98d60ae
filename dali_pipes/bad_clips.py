"""Clips that cannot be read: the policy, which clip of a refused batch is bad, and what stands in for it."""

import contextlib
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64

from dali_pipes.feeding import Epoch, Feed, Refused
from dali_pipes.sources import Images
from dali_pipes.stored import BadClip
from dali_pipes.videos import AnyFeed, VideoFeed
from dfer.cli import UserError, printable, say_error
from dfer.lists.index import ClipIndex

TOLERATED = 0.01  # share of the clips that may be bad by accident; one clip always may


class BadClips:
    """The clips of an index that cannot be read, as far as they were found, and what becomes of them.

    Args:
        index: the videos.
        policy: "error", or "skip" as `LoaderOptions.bad_clips` says.
    """

    def __init__(self, index: ClipIndex, policy: Literal["error", "skip"]):
        self._index, self._policy = index, policy
        self.found: dict[int, str] = {}  # row of the index -> reason, as it was the first time
        self._frames: dict[tuple[int, int], str] = {}  # (video, frame) that the decoder has refused before -> reason

    def add(self, video: int, error: BadClip, tell: bool = True) -> None:
        """Raise, or record and report a bad clip, as the policy says.

        Pass tell=False where every rank finds the same clip and only one should print.

        Raises:
            BadClip: `error` itself, with the policy "error".
            UserError: if it is one more than the TOLERATED share.
        """
        if self._policy == "error":
            raise error from None
        if video in self.found:
            return
        self.found[video] = str(error)
        if len(self.found) > max(1, TOLERATED * len(self._index)):
            raise UserError(
                f"{error}; with it, {len(self.found):,} of {len(self._index):,} clips cannot be read: more than "
                f"{TOLERATED:.0%} are not left out"
            )
        if tell:
            say_error(f"clip left out: {printable(error)}")

    def refused(self, videos: Int64[np.ndarray, " B"], frames: Int64[np.ndarray, "B T"]) -> dict[int, BadClip]:
        """Return the clips of a batch of which the decoder has refused a frame before, by their place, and why."""
        found: dict[int, BadClip] = {}
        if not self._frames:
            return found
        for place, (video, of_clip) in enumerate(zip(videos.tolist(), frames.tolist(), strict=True)):
            reasons = [self._frames[video, frame] for frame in of_clip if (video, frame) in self._frames]
            if reasons:
                found[place] = BadClip(reasons[0])
        return found

    def decode_one_by_one(
        self, feed: AnyFeed, rows: Int64[np.ndarray, " B"], good: Bool[np.ndarray, " B"], epoch: Epoch, message: str
    ) -> tuple[torch.Tensor, Bool[np.ndarray, " B"]]:
        """Return the pictures of a batch that DALI has refused, and which of its clips are good after all.

        DALI refuses a batch as a whole and does not always name a sample, so the same graph judges each clip alone:
        a clip is good or bad whatever its neighbours are.

        Args:
            feed: the graph.
            rows: of the plan.
            good: clips that could be fetched.
            epoch: what is drawn for them.
            message: why DALI refused the batch.

        Raises:
            BadClip: with the policy "error", the first bad clip.
            UserError: if too many are bad, or none of them alone.
        """
        clips: dict[int, torch.Tensor] = {}
        videos, replaced = epoch.plan.video[rows], False
        for place in np.flatnonzero(good).tolist():
            try:
                clips[place], other = self._decode_alone(feed, int(rows[place]), epoch)
                replaced |= other
            except BadClip as error:
                self.add(int(videos[place]), error)
        if len(clips) == good.sum() and not replaced:
            names = ", ".join(self._index.records[v].name for v in videos)
            raise UserError(f"decoding failed, though not of any one clip, in the batch of {names}: {message}")
        good = np.isin(np.arange(len(rows)), list(clips))
        if not clips:
            return feed.zeros(len(rows)), good
        stand_in = next(iter(clips.values()))
        return torch.cat([clips.get(place, stand_in) for place in range(len(rows))]), good

    def _decode_alone(self, feed: AnyFeed, row: int, epoch: Epoch) -> tuple[torch.Tensor, bool]:
        """Return the pictures of a row's clip, and whether DALI has refused frames of it, now or before.

        Raises:
            BadClip: if it cannot be decoded; its message names the frame, if the source has frames.
        """
        if isinstance(feed, VideoFeed):
            return feed.alone(row, epoch)
        video, frames, rows = int(epoch.plan.video[row]), epoch.plan.frames[row], np.array([row])
        clip = feed.source.fetch(video, frames)
        try:
            pictures = feed.alone(clip, rows, epoch)
            # Perhaps the batch was read before another one showed that DALI refuses a frame of this clip.
            return pictures, isinstance(feed.source, Images) and feed.source.has_refused(video, frames)
        except Refused as error:
            message = " ".join(str(error).split())
        if isinstance(feed.source, Images) and feed.source.kind == "images":
            refused = [place for place, data in enumerate(clip) if not _decodes(feed, data, rows, epoch)]
            for place in refused:
                frame = int(frames[place])
                try:
                    clip[place] = feed.source.refused(video, frame, clip[place])
                except BadClip as error:
                    self._frames[video, frame] = str(error)
                    raise
            if refused:
                with contextlib.suppress(Refused):
                    return feed.alone(clip, rows, epoch), True
        record = self._index.records[video]
        raise BadClip(f"{record.source}: decoding clip {record.name} ({record.path}) failed: {message}")


def _decodes(feed: Feed, data: np.ndarray, rows: Int64[np.ndarray, " 1"], epoch: Epoch) -> bool:
    """Return whether the graph takes an image alone."""
    try:
        feed.alone([data], rows, epoch)
    except Refused:
        return False
    return True


def stand_ins(rows: Int64[np.ndarray, " B"], good: Bool[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
    """Return the clips whose pixels a batch holds: for a bad one the first good one, so that its rows look like any."""
    return np.where(good, rows, rows[good.argmax()])


def hung(index: ClipIndex, video: int, num_late: int, num_clips: int, patience: float) -> UserError:
    """Return the error of a clip that was waited for too long; `num_late` of the batch's clips are not there."""
    record = index.records[video]
    return UserError(
        f"{record.source}: reading clip {record.name} ({record.path}) has taken more than {patience:g} s "
        f"({num_late} of {num_clips} clips of the batch are waiting): does the storage or a decoder hang?"
    )

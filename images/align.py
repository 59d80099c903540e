"""Whether one image is a geometric copy of another: cropped, flipped, turned, padded, scaled.

ORB features of both propose one similarity transform, for the image as it is and for its mirror image. Features alone take two
documents of one template for copies, whose lines and headings are the same; so one image is laid on the other, and the pair is
aligned only if nearly all blocks with anything on them correlate (docs/duplicates.md). A function of the two lumas, symmetric.
"""

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

ALIGNER = f"align 1, opencv {cv2.__version__}"
"""Fingerprint of what turns two lumas into an alignment. `align N` counts changes of this module's own code to any."""

LUMA_SIDE = 768
"""Pixels of the longer side, at most. At 512, text of a page is too small for its crops: .92 of invoices' halves found for 1.00."""

_KEYPOINTS = 1200
_LEAST = 32
"""ORB describes patches of 31 pixels: lumas of a shorter side have none."""
_ENLARGED = 384
"""Lumas of at most so many pixels are also searched at twice their size, where drawings of few lines have more to hold on to."""
_RATIO = 0.92
"""A match is kept if its bits differ in less than this share of those of the second best, seen from either side."""
_TOLERANCE = 4.0
_MIN_INLIERS = 4
_MAX_SCALE = 8.0

_BLOCK, _SMOOTH = 16, 1.0
"""Sides of the compared blocks, and the blur of what is compared, in pixels of the coarser image."""
_TEXTURE = 4
"""A block of which the levels' standard deviation is no larger in either image has nothing on it."""
_CORRELATED = 0.8
"""Blocks agree from this normalised correlation on."""
_REFINABLE, _MAX_SHIFT = 0.4, 12.0
"""Above this agreement the transform is refined, by at most so many pixels: a pixel off, fine text does not correlate."""

MIN_AGREEMENT = 0.8
"""Share of blocks with something on them that agree. Measured: docs/duplicates.md."""
MIN_BLOCKS = 8
MIN_OVERLAP, MIN_SHARE = 0.8, 0.15
"""What both show has to be so much of the smaller image, and so much of the larger: a logo is no copy of a page."""

# Pairs are aligned side by side, not each by as many threads as there are cores.
cv2.setNumThreads(1)

Grey = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.float64]


class Keypoints(NamedTuple):
    """Places float32 (N, 2) as x, y in pixels of the luma, and ORB's descriptors uint8 (N, 32)."""

    places: npt.NDArray[np.float32]
    descriptors: npt.NDArray[np.uint8]


class Features(NamedTuple):
    """The luma uint8 (H, W), what stands out in it, and what stands out in its mirror image."""

    luma: Grey
    upright: Keypoints
    mirrored: Keypoints


class Alignment(NamedTuple):
    """How one image lies on another, and how well.

    `matrix` is (m00, m01, m02, m10, m11, m12): it takes x, y in the luma of the first, or of its mirror image where `mirrored`, to
    those of the second. `overlap` and `share` are what both show as fractions of the smaller and of the larger image, `agreement` is
    the fraction of `blocks` that correlate.
    """

    mirrored: bool
    matrix: tuple[float, ...]
    inliers: int
    overlap: float
    share: float
    blocks: int
    agreement: float


def features_of(luma: Grey) -> Features:
    """Of any uint8 (H, W) that is not empty, `LUMA_SIDE` pixels on its longer side at most."""
    return Features(luma, _keypoints(luma), _keypoints(np.ascontiguousarray(luma[:, ::-1])))


def _keypoints(luma: Grey) -> Keypoints:
    found = [_orb(luma)]
    if max(luma.shape) <= _ENLARGED:
        twice = _orb(cv2.resize(luma, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR))
        found.append(Keypoints((twice.places / 2 - 0.25).astype(np.float32), twice.descriptors))
    return Keypoints(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _orb(luma: Grey) -> Keypoints:
    nothing = Keypoints(np.zeros((0, 2), np.float32), np.zeros((0, 32), np.uint8))
    if min(luma.shape) < _LEAST:
        return nothing
    orb = cv2.ORB_create(_KEYPOINTS, scaleFactor=1.2, nlevels=8, edgeThreshold=15, fastThreshold=8)
    found, descriptors = orb.detectAndCompute(luma, None)
    if descriptors is None:
        return nothing
    return Keypoints(cv2.KeyPoint_convert(found).reshape(-1, 2), descriptors)


def align(a: Features, b: Features) -> Alignment | None:
    """How `a` lies on `b`, where one of them is a geometric copy of the other. Flat or tiny images are copies of nothing here.

    Whether they are, and the measures, do not depend on which comes first.
    """
    swapped = _order(b.luma) < _order(a.luma)
    found = _measured(b, a) if swapped else _measured(a, b)
    if found is None or not _is_copy(found):
        return None
    return _turned(found, b.luma.shape[1], a.luma.shape[1]) if swapped else found


def _turned(found: Alignment, width: int, other_width: int) -> Alignment:
    """The same alignment seen from the other image, of `other_width` pixels; `width` is the first's."""
    matrix = cv2.invertAffineTransform(np.array(found.matrix).reshape(2, 3))
    if found.mirrored:
        # Mirrored are places of the first image: x of the inverse's result, and so x of what goes in.
        matrix = _flip(width) @ np.vstack([matrix, [0, 0, 1]]) @ np.vstack([_flip(other_width), [0, 0, 1]])
    return found._replace(matrix=tuple(matrix.ravel().tolist()))


def _flip(width: int) -> Matrix:
    return np.array([[-1, 0, width - 1], [0, 1, 0]], np.float64)


def _order(luma: Grey) -> tuple[tuple[int, ...], bytes]:
    return luma.shape, luma.tobytes()


def _is_copy(found: Alignment) -> bool:
    return (
        found.agreement >= MIN_AGREEMENT
        and found.blocks >= MIN_BLOCKS
        and found.overlap >= MIN_OVERLAP
        and found.share >= MIN_SHARE
    )


def _measured(a: Features, b: Features) -> Alignment | None:
    """The first hypothesis that makes them copies, else the one that agrees best."""
    best: Alignment | None = None
    for mirrored in (False, True):
        found = _hypothesis(a.mirrored if mirrored else a.upright, b.upright)
        if found is None:
            continue
        inliers, matrix = found
        luma = np.ascontiguousarray(a.luma[:, ::-1]) if mirrored else a.luma
        laid = _laid(luma, b.luma, matrix, inliers, mirrored)
        if laid and (best is None or laid.agreement > best.agreement):
            best = laid
        if laid and _is_copy(laid):
            break
    return best


def _signs(descriptors: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.unpackbits(descriptors, axis=1).astype(np.float32) * 2 - 1


def _hypothesis(a: Keypoints, b: Keypoints) -> tuple[int, Matrix] | None:
    """How many matches one similarity transform explains, and the transform float64 (2, 3) from a's places to b's."""
    if min(len(a.places), len(b.places)) < _MIN_INLIERS:
        return None
    # Sums of 256 times 1 or -1, exact in any order: 256 less twice the bits that differ.
    likeness = _signs(a.descriptors) @ _signs(b.descriptors).T
    theirs, ours = likeness.argmax(axis=1), likeness.argmax(axis=0)
    i = np.flatnonzero(ours[theirs] == np.arange(len(theirs)))
    j = theirs[i]
    nearest = 256 - likeness[i, j]
    likeness[i, j] = -256
    second = 256 - np.maximum(likeness[i].max(axis=1), likeness[:, j].max(axis=0))
    clear = nearest < _RATIO * second
    if clear.sum() < _MIN_INLIERS:
        return None
    # OpenCV draws its samples from a generator with a fixed seed.
    matrix, inlier = cv2.estimateAffinePartial2D(
        a.places[i[clear]],
        b.places[j[clear]],
        method=cv2.RANSAC,
        ransacReprojThreshold=_TOLERANCE,
        maxIters=2000,
        confidence=0.999,
    )
    if matrix is None or int(inlier.sum()) < _MIN_INLIERS:
        return None
    return int(inlier.sum()), matrix


def _laid(a: Grey, b: Grey, matrix: Matrix, inliers: int, mirrored: bool) -> Alignment | None:
    """Both in the frame of the coarser one, and how well they agree there."""
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    if not 1 / _MAX_SCALE < scale < _MAX_SCALE:
        return None
    onto_a = scale > 1
    if onto_a:
        a, b, matrix, scale = b, a, cv2.invertAffineTransform(matrix), 1 / scale
    finer = a if scale > 0.9 else cv2.GaussianBlur(a, (0, 0), 0.5 * float(np.sqrt(1 / scale**2 - 1)))
    smooth = cv2.GaussianBlur(b, (0, 0), _SMOOTH)

    def laid(matrix: Matrix) -> Alignment:
        size = (b.shape[1], b.shape[0])
        over = cv2.warpAffine(finer, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        inside = cv2.warpAffine(np.full(a.shape, 1, np.uint8), matrix, size, flags=cv2.INTER_NEAREST)
        overlap = int(inside.sum())
        areas = (a.size * float(abs(np.linalg.det(matrix[:, :2]))), float(b.size))
        blocks, agreement = _agreement(
            cv2.GaussianBlur(over, (0, 0), _SMOOTH), smooth, cv2.erode(inside, np.ones((7, 7), np.uint8))
        )
        back = cv2.invertAffineTransform(matrix) if onto_a else matrix
        return Alignment(
            mirrored,
            tuple(back.ravel().tolist()),
            inliers,
            overlap / min(areas),
            overlap / max(areas),
            blocks,
            agreement,
        )

    first = laid(matrix)
    if _is_copy(first) or first.agreement < _REFINABLE:
        return first
    refined = laid(_refined(finer, b, matrix))
    return max(first, refined, key=lambda found: found.agreement)


def _refined(a: Grey, b: Grey, matrix: Matrix) -> Matrix:
    """The transform after maximising the images' correlation; as it was where that leads nowhere or far away."""
    inverse = cv2.invertAffineTransform(matrix).astype(np.float32)
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 1e-4)
    try:
        _, inverse = cv2.findTransformECC(b, a, inverse, cv2.MOTION_AFFINE, criteria, None, 5)
    except cv2.error:
        return matrix
    better = cv2.invertAffineTransform(inverse.astype(np.float64))
    height, width = a.shape
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], np.float64)
    shift = np.abs(corners @ (better - matrix).T).max()
    return better if shift < _MAX_SHIFT else matrix


def _agreement(a: Grey, b: Grey, inside: Grey) -> tuple[int, float]:
    """Blocks that lie inside and have something on them in either image, and the share of them that correlate."""
    height, width = (side // _BLOCK for side in a.shape)
    if not height * width:
        return 0, 0.0

    def sums(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        cut = values[: height * _BLOCK, : width * _BLOCK].reshape(height, _BLOCK, width, _BLOCK)
        return np.asarray(cut.sum(axis=(1, 3)))

    n = _BLOCK * _BLOCK
    ours, theirs = a.astype(np.int64), b.astype(np.int64)
    sum_a, sum_b = sums(ours), sums(theirs)
    spread_a, spread_b = n * sums(ours * ours) - sum_a**2, n * sums(theirs * theirs) - sum_b**2
    common = n * sums(ours * theirs) - sum_a * sum_b
    textured = (sums(inside.astype(np.int64)) == n) & (np.maximum(spread_a, spread_b) > (n * _TEXTURE) ** 2)
    blocks = int(textured.sum())
    if not blocks:
        return 0, 0.0
    norm = np.sqrt(spread_a[textured].astype(np.float64) * spread_b[textured])
    return blocks, float((common[textured] > _CORRELATED * norm).mean())

"""Single modules of the page, imported in the browser."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from pixano_edge.engine.models.rle import encode_rle
from tests.support.page_user import User, at_size, page_base

pytestmark = pytest.mark.browser


DECODE = """async ([base, rle, width, height]) => {
  const { Mask } = await import(`${base}/rle.js`);
  const mask = new Mask(rle);
  return [mask.area, mask.sample().join(""), mask.sample(width, height).join("")];
}"""


def test_run_lengths_as_pycocotools_writes_them(user: User) -> None:
    user.open()
    base = page_base(user)
    random = np.random.default_rng(5)
    masks = [np.zeros((7, 5), bool), np.ones((3, 9), bool), np.ones((1, 1), bool), np.zeros((1, 1), bool)]
    masks += [
        random.random((int(h), int(w))) < share
        for h, w, share in zip((1, 40, 97, 161), (60, 1, 161, 97), (0.5, 0.1, 0.5, 0.9))
    ]
    blob = np.zeros((300, 200), np.uint8)
    cv2.ellipse(blob, (90, 160), (70, 110), 20, 0, 360, 1, -1)
    masks.append(blob.astype(bool))
    for mask in masks:
        rle = encode_rle(mask)
        counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
        for height, width in ((13, 29), (mask.shape[0] * 2, mask.shape[1] * 3)):
            area, whole, sampled = user.page.evaluate(
                DECODE, [base, {"size": list(mask.shape), "counts": counts}, width, height]
            )
            assert area == mask.sum()
            assert np.array_equal(np.frombuffer(whole.encode(), np.uint8).reshape(mask.shape) == 49, mask)
            assert np.array_equal(
                np.frombuffer(sampled.encode(), np.uint8).reshape(height, width) == 49, at_size(mask, (height, width))
            )


def test_damaged_run_lengths_are_refused(user: User) -> None:
    user.open()
    base = page_base(user)
    for counts in ("", "0", "zzz", "oooooooooo", "\x10", [3, 5], "]"):
        with pytest.raises(Exception, match="runs"):
            user.page.evaluate(DECODE, [base, {"size": [4, 5], "counts": counts}, 4, 5])
    assert user.page.evaluate(DECODE, [base, {"size": [4, 5], "counts": [3, 5, 12]}, 5, 4])[0] == 5

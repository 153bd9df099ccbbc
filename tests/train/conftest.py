"""What the tests of training share."""

import pytest

from openblip.train import log


@pytest.fixture(scope="module")
def no_pictures():
    """Drawing takes longer than all the training here; test_log looks at pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "draw_curves", lambda metrics, picture: picture.write_bytes(b"curves"))
        yield

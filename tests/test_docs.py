"""Code in the pages of `docs/`, run as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_page_on_any_model_trains_and_answers(capsys):
    page = (REPOSITORY / "docs" / "any_model.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    exec("\n".join(blocks), names)
    learned = np.mean(np.argmax(names["logits"][-1], axis=-1) == names["labels"])
    assert learned > 0.9
    assert str(names["predictor"](names["images"]).predicted) in capsys.readouterr().out
    # The page's predictor runs the whole network where stopping early would not pay.
    parts = names["stages"], names["example"], names["fitted"].policy
    staged = names["EarlyExitPredictor"](*parts, fall_back=False)(names["images"])
    assert (staged.exit_index < 2).any()
    assert len(names["nnx_stages"]) == len(names["eqx_stages"]) == 3
    assert names["outputs"].logits.shape == (3, 32, 10)

"""What of the interpreter's tests is quick: of the larger tables of cases every second or third; the rest is slow.

A case takes a second, and `make test` may spend two minutes on Triton; `make test-gpu-without-gpu` runs all.
"""

import pytest

EVERY = {
    "test_heads": 2,
    "test_row_kernels_and_pytorch_agree": 2,
    "test_options": 2,
    "test_norms": 3,
    "test_masks_are_decided_alike_in_both_directions": 2,
    "test_several_chunks_and_rows_that_share_a_target": 2,
    "test_several_calls_and_chunks": 2,
    "test_weights_of_16_bits_in_several_chunks": 2,
    "test_margins_and_scales_of_rows": 2,
    "test_chunks_of_other_layouts": 2,
    "test_training": 2,
    "test_a_center_that_is_nan_is_seen": 3,
    "test_loss_scale_in_fp16": 2,
    "test_updates": 2,
}


def mark_slow(items: list[pytest.Item]) -> None:
    seen = dict.fromkeys(EVERY, 0)
    for item in items:
        name = getattr(item, "originalname", None)
        if name in seen and item.path.parent.name == "interpreter" and not item.get_closest_marker("slow"):
            if seen[name] % EVERY[name]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1

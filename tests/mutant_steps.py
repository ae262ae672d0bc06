"""Planted errors in the Triton kernels of the optimizers' steps; see tests/mutants.py."""

from .mutant_record import in_file as _in

TRITON_STEP_MUTANTS = [
    *_in(
        "fused_margin/kernels/update.py",
        ("triton_sgd_decay_dropped", "g += decay * w", "g += 0 * w"),
        ("triton_adamw_decay_dropped", "        w *= decay\n", ""),
        ("triton_first_step_dampened", "tl.where(t == 1, 1.0, own)", "tl.where(t == 0, 1.0, own)"),
        ("triton_nesterov_is_momentum", "g += keep * m", "g = m"),
        ("triton_square_of_nothing", "own_square * g * g", "own_square * g"),
        ("triton_eps_inside_the_root", "tl.sqrt_rn(v), tl", "tl.sqrt_rn(v + eps), tl"),
        ("triton_power_near_one", "tl.where(y > -0.5, x * p, 1 - tl.exp(y))", "1 - tl.exp(y)"),
        ("triton_power_series_cut", "p = 1 - x * (1 / 5) * p", "p = 1 - x * (1 / 5)"),
        ("triton_class_has_a_row_of_steps", "tl.load(step + row // together)", "tl.load(step + row)"),
        ("triton_momentum_not_stored", "tl.store(m + at, b_m, mask=mask)", "pass"),
        ("triton_columns_of_the_next_row", "(i < rows)[:, None] & (d < D)", "(i < rows)[:, None] & (d <= D)"),
        ("triton_state_of_the_first_rows", "at = row[:, None] * D", "at = (row - row + tl.arange(0, 1))[:, None] * D"),
    ),
    *_in(
        "fused_margin/kernels/backward.py",
        (
            "triton_step_before_the_jacobian",
            "        if NORMALIZE:\n            square",
            '        if NORMALIZE and OPTIMIZER == "":\n            square',
        ),
        ("triton_other_calls_dropped", "        if ADD:\n", '        if ADD and OPTIMIZER == "":\n'),
        ("triton_calls_overwrite", "        if ADD:\n", '        if ADD and OPTIMIZER != "":\n'),
        ("triton_state_by_place", "step, j_source, d, mask", "step, low * CENTERS + j_row.to(tl.int64), d, mask"),
    ),
    *_in(
        "fused_margin/kernels/gradients.py",
        ("triton_first_call_updates", "and call is calls[-1]", "and call is calls[0]"),
        ("triton_every_call_updates", "is not None and call is calls[-1]", "is not None"),
        ("triton_batch_of_another_call", "gradient[: call.plan.batch, :n]", "gradient[: calls[0].plan.batch, :n]"),
    ),
    *_in(
        "fused_margin/kernels/steps.py",
        ("triton_steps_not_counted", "state.step.add_(1)", "state.step.add_(0)"),
        ("triton_steps_of_rows_not_counted", "index if together == 1 else", "index[:0] if together == 1 else"),
        ("triton_betas_exchanged", "1 - u.beta1, u.beta2, 1 - u.beta2", "1 - u.beta2, u.beta2, 1 - u.beta1"),
        ("triton_rows_may_fall", "    check_rising(index)\n", ""),
    ),
]

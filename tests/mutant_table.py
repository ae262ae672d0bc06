"""The planted errors of tests/mutants.py: a file, a text that stands in it once, and what takes its place."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str


def _in(file: str, *rows: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, file, old, new) for name, old, new in rows]


MUTANTS = [
    *_in(
        "fused_margin/angles.py",
        ("sine_floor_dropped", "SINE_FLOOR = 1e-3", "SINE_FLOOR = 0.0"),
        ("sine_slope_sign", "_with_slope(sine, -at /", "_with_slope(sine, at /"),
    ),
    *_in(
        "fused_margin/margins/softmax.py",
        ("margin_wrong_by_0_002", "return cos_y - self.m", "return cos_y - self.m - 0.002"),
    ),
    *_in(
        "fused_margin/margins/base.py",
        (
            "detached_keeps_the_slope",
            "return self.target(cos_y.detach()) + (cos_y - cos_y.detach())",
            "return self.target(cos_y)",
        ),
        ("margin_of_another_class", "torch.where(inside, labels, 0)]", "torch.where(inside, labels - 1, 0)]"),
        ("state_moves_in_eval", "if not self.training:", "if False:"),
        ("state_after_use", "state.copy_(new)\n        return new", "state.copy_(new)\n        return old"),
        ("mean_over_ignored_rows", "self.valid.sum().clamp_min(1)", "len(self.valid)"),
    ),
    *_in(
        "fused_margin/margins/angular.py",
        ("arcface_sign", "safe_sine(cos_y) * sin_m, beyond", "safe_sine(cos_y) * -sin_m, beyond"),
        ("tail_condition_flipped", "beyond = cos_y < -cos_m", "beyond = cos_y > -cos_m"),
        ("tail_linear_for_continuous", "c - joint - 1, value", "c - drop, value"),
        ("tail_clamp_wrong", "torch.where(beyond, -1.0, value)", "torch.where(beyond, -0.999, value)"),
        ("tail_easy_includes_zero", "torch.where(c > 0, value, c)", "torch.where(c >= 0, value, c)"),
        ("psi_last_segment_lost", "for i in range(1, int(m)))", "for i in range(1, int(m) - 1))"),
        ("psi_offset", "* value - 2 * k", "* value - k"),
        ("psi_segment_rounded", "k = torch.floor((angle * m", "k = torch.round((angle * m"),
        ("combined_m3_sign", "sin_of(self.m2)) - self.m3", "sin_of(self.m2)) + self.m3"),
        ("combined_joint", "cos_of((math.pi - self.m2) / self.m1)", "cos_of(math.pi - self.m2)"),
        ("annealed_weight", "/ (1 + self.lam)", "/ (2 + self.lam)"),
        ("l_softmax_norm_of_w", "rows.norm * rows.weight_norm", "rows.norm * rows.weight_norm.detach()"),
        ("multiple_unclamped", "angle.detach() > math.pi, -1.0", "angle.detach() > 4.0, -1.0"),
    ),
    *_in(
        "fused_margin/margins/mining.py",
        ("sv_offset", '"hard", (self.t, self.t - 1)', '"hard", (self.t, 1 - self.t)'),
        (
            "sv_mask_without_margin",
            "def threshold(self, cos_y: Tensor) -> Tensor:\n        return self.base.target(cos_y)",
            "def threshold(self, cos_y: Tensor) -> Tensor:\n        return cos_y",
        ),
        ("mv_adaptive_offset", "(self.t + 1, self.t) if", "(self.t + 1, self.t - 1) if"),
        ("mv_mask_is_easy", "0 if self.easy", "-1 if self.easy"),
        ("npc_margin_of_hard_rivals", "self.m0 + self.m1 * self.hard_mean", "self.m0 - self.m1 * self.hard_mean"),
        ("arcneg_centre", "return self.target(cos_y)\n\n    def rule", "return cos_y\n\n    def rule"),
    ),
    *_in(
        "fused_margin/margins/bounds.py",
        ("eqm_offset_ignored", "self.t1) - offset", "self.t1)"),
        ("eqm_upper_for_lower", "(self.t2, math.inf)", "(-math.inf, self.t2)"),
        ("circle_weight_learns", "torch.relu(1 + self.m - cos_y).detach()", "torch.relu(1 + self.m - cos_y)"),
    ),
    *_in(
        "fused_margin/margins/adaptive.py",
        ("adaface_sign", "- self.m * self.q).clamp", "+ self.m * self.q).clamp"),
        ("adaface_biased_std", "(rows.valid.sum() - 1).clamp_min(1)", "rows.valid.sum().clamp_min(1)"),
        ("magface_penalty", "self.norms / self.u_a**2", "self.norms / self.u_a"),
        ("magface_norm_detached", "PerSample(rows.norm.clamp(self.l_a", "PerSample(rows.norm.detach().clamp(self.l_a"),
        ("elastic_plus_order", "argsort(descending=True).argsort()", "argsort(descending=True)"),
        ("adam_penalty", "self.weight * (1 - self.mean)", "self.weight * self.mean"),
        ("kappa_weight", "self.gamma * spread + (1 - self.gamma)", "self.gamma * spread + self.gamma"),
        ("counts_power", "clamp_min(1) ** -power", "clamp_min(1) ** (-2 * power)"),
    ),
    *_in(
        "fused_margin/margins/uncoupled.py",
        ("sphere2_balance", "self.balance * softplus(-out.z)", "(1 - self.balance) * softplus(-out.z)"),
        ("sphere2_weight", "self.weight / out.scale * loss", "self.weight * loss"),
        ("sphere2_rivals", 'float(self.m) if self.kind == "C"', '-float(self.m) if self.kind == "C"'),
        ("uniface_weight", "softplus(-out.z) + self.weight * out.red", "softplus(-out.z) + out.red"),
        ("uniface_bias_sign", "Whole(-self.b.to(rows.dtype))", "Whole(self.b.to(rows.dtype))"),
    ),
    *_in(
        "fused_margin/margins/reference_only.py",
        ("ga_margin_outside", "angle = self.m * safe_angle(cos_y)", "angle = safe_angle(cos_y)"),
        ("qam_power", "self.m) ** 2", "self.m) ** 1"),
        ("sface_weight_learns", "safe_angle(cos_y.detach())", "safe_angle(cos_y)"),
    ),
    *_in(
        "fused_margin/scales.py",
        ("adacos_after_use", "self.s.copy_(new)\n        return new", "self.s.copy_(new)\n        return s"),
        ("adacos_mean", "- count.clamp_min(1).to(rows.dtype).log()", ""),
    ),
    *_in(
        "fused_margin/rows.py",
        ("focal_power", "miss**self.gamma", "miss ** (self.gamma + 1)"),
        ("hard_rows_upside_down", "argsort(descending=True, stable=True)", "argsort(stable=True)"),
        ("smoothing_without_target", "(out.z + out.sum_u) / num_classes", "out.sum_u / num_classes"),
        ("mean_over_no_row", "torch.where(count > 0, count, 1)", "count"),
        ("ignore_index_ignored", "loss = torch.where(valid, loss, 0)\n    if extras.mining", "if extras.mining"),
        ("mean_of_ignored_rows", "counts = weights * valid.to(loss.dtype)", "counts = weights * torch.ones_like(loss)"),
        ("class_weight_in_the_mean", "weights * valid.to(", "1.0 * valid.to("),
    ),
    *_in(
        "fused_margin/rules.py",
        ("mask_side", "c > tau, args[0] * c + args[1]", "c < tau, args[0] * c + args[1]"),
        ("mask_not_strict", "c > tau, args[0] * c + args[1]", "c >= tau, args[0] * c + args[1]"),
        ("curricular_without_t", "c * (args[0] + c)", "c * (1 + c)"),
        ("clip_without_floor", "torch.where(c <= args[0], args[0], ", "torch.where(c <= -2, args[0], "),
        ("filter_keeps", "torch.where(c > args[0], torch.zeros_like(c), c)", "torch.where(c > args[0], c, c)"),
        ("gauss_weight_has_gradient", "weight.detach() * (c + 1) - 1", "weight * (c + 1) - 1"),
        (
            "rule_args_wait_for_the_device",
            "return torch.full((), a, dtype=dtype, device=like.device)",
            "return torch.tensor(a, dtype=dtype, device=like.device)",
        ),
        ("circle_weight_negative", "torch.relu(c + args[0]).detach()", "(c + args[0]).detach()"),
    ),
    *_in(
        "fused_margin/functional.py",
        ("target_bias_forgotten", "z = z + own", "pass"),
        ("scale_gradient_dropped", 'acc, "scale").expand', 'acc, "scale").detach().expand'),
        ("norm_gradient_dropped", "where(valid[:, None], x, 0)", "where(valid[:, None], x.detach(), 0)"),
        ("rivals_never_detached", 'unit_slope=margin.gradient == "detached"', "unit_slope=False"),
        ("autocast_ignored", "if torch.is_autocast_enabled(device)", "if False"),
        ("ignored_rows_are_correct", "correct = (head.valid & ", "correct = ("),
        ("topk_class_numbers", "torch.cat([ids, place + first], 1)", "torch.cat([ids, place], 1)"),
    ),
    *_in(
        "fused_margin/spec.py",
        ("eps_of_the_norm", "EPS = 1e-12", "EPS = 1e-8"),
    ),
    *_in(
        "fused_margin/heads.py",
        ("head_forgets_its_bias", "bias=self.bias,", "bias=None,"),
        ("head_starts_large", "std=0.01", "std=0.1"),
    ),
    *_in(
        "fused_margin/ops.py",
        ("subset_gradient_misplaced", ".index_copy(0, index, grads[1])", ".index_copy(0, index.flip(0), grads[1])"),
        ("every_gradient_computed", "strict=True) if wanted)\n", "strict=True))\n"),
    ),
    *_in(
        "fused_margin/backends/reference.py",
        ("reference_clamp_dropped", "c + (c.clamp(-1, 1) - c).detach()", "c + (c - c).detach()"),
        ("reference_labels_unchecked", "if bad.any():", "if False:"),
        ("reference_sum_gradient", "g_red[:, None] * a + g_sum_u[:, None]", "g_red[:, None] * a"),
        ("reference_shard_offset", "position = labels - spec.first_class", "position = labels"),
        ("reference_bias_forgotten", "u if bias is None else u + bias", "u"),
    ),
    *_in(
        "fused_margin/margins/forms.py",
        ("subclass_taken_for_its_base", "_FORMS.get(type(margin))", "_FORMS.get(type(margin).__mro__[1])"),
        ("forms_of_sv_without_margin", "Forms(base.target, base.target)", "Forms(base.target, Form())"),
    ),
    *_in(
        "csrc/margins.h",
        ("kernel_tail_condition", "beyond = c < -cos_m", "beyond = c < cos_m"),
        ("kernel_slope_of_arcface", "cos_m + c / floored(sine) * sin_m", "cos_m - c / floored(sine) * sin_m"),
        ("kernel_sine_floor", "kSineFloor = T(1e-3)", "kSineFloor = T(1e-2)"),
        ("kernel_psi_segment", "k += c <= std::cos(T(i)", "k += c < std::cos(T(i + 1)"),
        ("kernel_psi_slope", "2 * value + 2 * c * slope - d_before", "2 * value + c * slope - d_before"),
        ("kernel_joint", "std::cos((kPi<T> - f.m2) / f.m1)", "std::cos(kPi<T> - f.m2)"),
        ("kernel_m3", "{t.value - f.m3, t.slope}", "{t.value + f.m3, t.slope}"),
        ("kernel_slope_of_the_loss", "u > T(0) ? T(1) / (T(1) + e) : small", "T(1) / (T(1) + e)"),
    ),
    *_in(
        "csrc/cpu/rows.cpp",
        ("kernel_detached_slope", "p.unit_slope ? 1 : t.slope", "t.slope"),
        ("kernel_slope_by_scale", "T(-l.slope * t.value)", "T(-l.slope)"),
    ),
    *_in(
        "csrc/cpu/ops.cpp",
        ("kernel_threshold", "read_form(forms, 1)", "read_form(forms, 0)"),
        ("kernel_mean_over_all_rows", "1.0 / double(std::max<int64_t>(valid, 1))", "1.0 / double(p.batch)"),
    ),
    *_in(
        "csrc/rules.h",
        (
            "kernel_mask_side",
            "const auto masked = c > tau;\n    return {Ops::select(masked, args[0] * c",
            "const auto masked = c < tau;\n    return {Ops::select(masked, args[0] * c",
        ),
        ("kernel_slope_forgotten", "Ops::select(masked, one * args[0], one)", "one"),
        ("kernel_curricular_slope", "T(2) * c + args[0], one", "c + args[0], one"),
        ("kernel_gauss_sign", "(c - tau) * (tau - c)", "(c - tau) * (c - tau)"),
    ),
    *_in(
        "csrc/cpu/sweep.h",
        ("kernel_label_off_by_one", "j >= 0 && j < t.classes ? T(j)", "j >= 0 && j < t.classes - 1 ? T(j)"),
        ("kernel_norm_of_a_part", "for (; d < dim; d++) sum += double(row[d]) * double(row[d]);", ""),
        ("kernel_eps_dropped", "T(1 / (norm < kEps ? kEps : norm))", "T(1 / norm)"),
        ("kernel_lesser_centres_count", "excluded |= loser;", ""),
        ("kernel_softplus_slope", "slope = select(u < zero, e, one)", "slope = select(u < zero, one, e)"),
    ),
    *_in(
        "csrc/cpu/forward.h",
        ("kernel_sum_not_rescaled", "    sum[l] *= factor[l];\n", ""),
        ("kernel_output_not_rescaled", "if (changed && number > begin)", "if (false)"),
        ("kernel_splits_not_rescaled", "return T(factor(s) / whole); }", "return T(1 / whole); }"),
        ("kernel_shares_lost", "(s ? out[d] : T(0)) + f * in[d]", "f * in[d]"),
        ("kernel_tile_lost", "(split + 1) / cut.splits", "(split + 1) / cut.splits - (split + 1 < cut.splits)"),
        ("kernel_exponent_rounded", "exponential(shifted + K * T(2.121944400546905e-4))", "exponential(shifted)"),
        ("kernel_bias_forgotten", "scale * n.value + t.bias[j]", "scale * n.value"),
    ),
    *_in(
        "csrc/cpu/backward.h",
        ("kernel_unit_slope_ignored", "(p.unit_slope ? zero + T(1) : n.slope)", "n.slope"),
        ("kernel_sum_gradient_dropped", "g_red * a + g_sum)", "g_red * a)"),
        ("kernel_duplicate_labels", "out[d] += g * (x[d] - along * w[d])", "out[d] = g * (x[d] - along * w[d])"),
        ("kernel_target_projection_dropped", "out[d] += g * (x[d] - along * w[d])", "out[d] += g * x[d]"),
        ("kernel_projection_dropped", "(sum - g.along[m] * load(w + m * P + v * lanes)) * t.inv[m]", "sum * t.inv[m]"),
        ("kernel_clamped_norm_varies", "p.normalize_w && inv < T(1 / kEps)", "p.normalize_w"),
        ("kernel_row_blocks_overwrite", "return k + cos.first ? load", "return k ? load"),
        ("kernel_ragged_dimension_lost", "else if (room > 0)", "else if (false)"),
    ),
    *_in(
        "csrc/cpu/rows.cpp",
        ("kernel_clamp_dropped", "c = c < -1 ? -1 : c > 1 ? 1 : c;", ""),
        ("kernel_x_projection_dropped", "(d_hat[d] - along * x[d])", "d_hat[d]"),
        ("kernel_target_norm_forgotten", "g.g_cos_y[i] * (p.normalize_w ?", "g.g_cos_y[i] * (false ?"),
    ),
    *_in(
        "csrc/cpu/call.h",
        ("kernel_label_range", "label >= o.num_classes", "label > o.num_classes"),
        ("kernel_stride_of_labels", "y[i * labels.stride(0)]", "y[i]"),
    ),
    *_in(
        "csrc/cpu/ops.cpp",
        (
            "kernel_no_rival_guard",
            "std::replace(red.begin(), red.end(), -std::numeric_limits<T>::infinity(), nothing);",
            "",
        ),
        ("kernel_padding_rows_leak", "std::fill(red.begin() + p.batch, red.end(), nothing);", ""),
    ),
    *_in(
        "csrc/cpu/storage.h",
        ("kernel_index_ignored", "w.index ? w.index[r] : r", "r"),
        ("kernel_columns_contiguous", "Storage::f32) && w.col_stride == 1)", "Storage::f32))"),
    ),
    *_in(
        "csrc/cpu/product.h",
        ("kernel_depth_overwrites", "return k ? load(at(m, v)) : Vec<T>{};", "return Vec<T>{};"),
        ("kernel_last_rows_lost", "while (M - m > 0) multiply_rows<summed, 1>(m, K, a, next, b, start, finish);", ""),
        ("kernel_last_columns_zero", "k < dim ? row[k] : T(0)", "T(0)"),
        ("kernel_padding_not_zero", "k < dim ? row[k] : T(0)", "k < dim ? row[k] : T(1)"),
    ),
]  # fmt: skip

TRITON_MUTANTS = [
    *_in(
        "fused_margin/kernels/rival.py",
        ("triton_hard_offset_lost", "value = tl.where(c > tau, a * c + b, c)", "value = tl.where(c > tau, a * c, c)"),
        ("triton_curricular_slope", "2 * c + a, slope)", "c + a, slope)"),
        ("triton_margin_wrong_by_0_002", "    value = c\n    slope", "    value = c - 0.002\n    slope"),
    ),
    *_in(
        "fused_margin/kernels/tile.py",
        ("triton_padded_columns_are_rivals", "keep = valid[None, :] & (j_class", "keep = (j_class"),
        ("triton_columns_beyond_d", "mask=d[:, None] < D, other=0.0)", "mask=d[:, None] <= D, other=0.0)"),
        ("triton_range_never_follows", "larger = power_of_two(top)", "larger = unit"),
        ("triton_second_center_wins", "tl.where(groups == tl.max(groups, 2)", "tl.where(groups == tl.min(groups, 2)"),
        ("triton_clamp_lost", "tl.where(c > 1, 1.0, c)", "c"),
    ),
    *_in(
        "fused_margin/kernels/forward.py",
        ("triton_sum_not_rescaled", "two_sum(total * shrink,", "two_sum(total,"),
        ("triton_o_not_rescaled", "acc *= shrink[:, None]", "acc *= 1"),
        ("triton_splits_overlap", "tl.int64) + 1) * tiles", "tl.int64) + 2) * tiles"),
        ("triton_mean_not_rescaled", "mean_v *= shrink", "mean_v *= 1"),
    ),
    *_in(
        "fused_margin/kernels/rows.py",
        ("triton_label_after_the_shard", "(label < first_class + classes)", "(label <= first_class + classes)"),
        ("triton_merge_without_powers", "factor = tl.exp2(powers - power[:, None])", "factor = powers * 0 + 1"),
    ),
    *_in(
        "fused_margin/kernels/row_gradients.py",
        ("triton_ranks_collide", "(other[None, :] < own[:, None])", "(other[None, :] <= own[:, None])"),
        ("triton_loss_scale_in_fp16", "common = _largest_factor(scale", "common = 1.0 + 0 * _largest_factor(scale"),
        ("triton_x_projection_lost", "h = (h - along[:, None] * x_hat)", "h = (h - 0 * x_hat)"),
    ),
    *_in(
        "fused_margin/kernels/backward.py",
        ("triton_w_projection_lost", "h = (h - along[:, None] * b_w)", "h = (h - 0 * b_w)"),
        ("triton_next_tile_targets", "(y < low + CLASSES)", "(y < low + CLASSES - 1)"),
        ("triton_half_unit_lost", "h *= tl.load(unit) / HALF_UNIT", "h *= tl.load(unit)"),
        ("triton_last_row_block", "mask=(i < batch)[:, None] & valid[None, :]", "mask=valid[None, :]"),
        ("triton_bias_parts", "j_sum += tl.load", "j_sum = tl.load"),
    ),
    *_in(
        "fused_margin/kernels/margins.py",
        ("triton_tail_flipped", "beyond = c < -cos_m2", "beyond = c > -cos_m2"),
        ("triton_mean_over_ignored_rows", "tl.sum((label != ignore_index)", "tl.sum((i < batch)"),
        ("triton_psi_sign", "sign = 1 - 2 * (k", "sign = 1 - 0 * (k"),
    ),
    *_in(
        "fused_margin/kernels/gradients.py",
        ("triton_chunks_overwrite_dx", "to.o, add=first > 0)", "to.o, add=False)"),
    ),
]  # fmt: skip

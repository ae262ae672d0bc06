"""The scale of each loss where none is given, scales that a loss refuses, and AdaCos."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_margin as fm
from fused_margin.functional import margin_cross_entropy

from . import oracle
from .cases import spread

B, C, D = 12, 20, 8
RAW = {"normalize_embeddings": False, "normalize_weight": False}
DEFAULTS = {  # from the papers and the codes that docs/losses.md names
    "ArcFace": (fm.ArcFace, 64),
    "CosFace": (fm.CosFace, 64),
    "CombinedMargin": (fm.CombinedMargin, 64),
    "NormFace": (fm.NormFace, 64),
    "SphereFace": (fm.SphereFace, 30),
    "X2Softmax": (fm.X2Softmax, 64),
    "LSoftmax": (fm.LSoftmax, 1),
    "Annealed": (lambda: fm.Annealed(fm.SphereFace(4)), 30),
    "SVSoftmax": (fm.SVSoftmax, 30),
    "MVSoftmax": (fm.MVSoftmax, 32),
    "CurricularFace": (fm.CurricularFace, 64),
    "NPCFace": (fm.NPCFace, 64),
    "ArcNegFace": (fm.ArcNegFace, 64),
    "EqM": (fm.EqM, 64),
    "InterclassFilter": (fm.InterclassFilter, 64),
    "CircleLoss": (fm.CircleLoss, 256),
    "AdaFace": (fm.AdaFace, 64),
    "MagFace": (fm.MagFace, 64),
    "ElasticFace": (fm.ElasticFace, 64),
    "AdaMSoftmax": (lambda: fm.AdaMSoftmax(C), 30),
    "KappaFace": (lambda: fm.KappaFace(torch.ones(C), D), 64),
    "SphereFace2": (lambda: fm.SphereFace2(C), 40),
    "UniFace": (lambda: fm.UniFace(C), 64),
    "GASoftmax": (fm.GASoftmax, 30),
    "LiArcFace": (fm.LiArcFace, 64),
    "QAMFace": (fm.QAMFace, 6),
    "SphereFaceR": (fm.SphereFaceR, 30),
    "SFace": (fm.SFace, 64),
    "P2SGrad": (fm.P2SGrad, 1),
}


@pytest.fixture
def inputs():
    x, w, labels = spread(B, C, D, 0)
    return x, w, labels


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_scale(name, inputs):
    """In the function and in both heads, as the margin says it."""
    make, scale = DEFAULTS[name]
    x, w, labels = inputs
    given = RAW if name == "LSoftmax" else {}
    run = dict(reduction="none", backend="reference", **given)
    losses = []
    for options in ({}, {"scale": float(scale)}):
        torch.manual_seed(0)
        losses.append(margin_cross_entropy(x, w, labels, make(), **run, **options))
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    assert make().default_scale == scale
    assert fm.MarginHead(D, C, make(), **given).scale == fm.PartialFC(D, C, make(), **given).scale == scale


def test_every_margin_says_its_scale():
    """A class that is not in the table above, or in the list of docs/losses.md with another number, fails."""
    margins = {n for n, t in vars(fm).items() if isinstance(t, type) and issubclass(t, fm.Margin)}
    assert margins - {"Margin", "StatefulMargin", "CustomMargin"} == set(DEFAULTS)
    text = Path(__file__).parent.parent.joinpath("docs/losses.md").read_text()
    text = text.partition("**Scale.**")[2].partition("\n\n")[0]
    listed = {}
    for number, names in re.findall(r"(\d+): ((?:`\w+`(?:, | and )?)+)", text):
        listed |= dict.fromkeys(re.findall(r"\w+", names.replace(" and ", " ")), int(number))
    assert listed == {n: scale for n, (_, scale) in DEFAULTS.items() if scale != 64 and n != "Annealed"}


def test_scale_of_products_is_1(inputs):
    x, w, labels = inputs
    expected = F.cross_entropy(F.linear(x, w), labels)
    torch.testing.assert_close(margin_cross_entropy(x, w, labels, fm.NormFace(), **RAW), expected)
    head = fm.MarginHead(D, C, fm.NormFace(), normalize_embeddings=False)
    assert head.scale == 1
    assert fm.MarginHead(D, C, lambda c: c - 0.1).scale == 64


def test_sphereface_2_starts_for_the_scale_that_the_head_takes():
    assert fm.MarginHead(D, C, fm.SphereFace2(C, scale=25)).scale == 25


@pytest.mark.parametrize("norm", ["none", "soft"])
def test_norms_as_scale(norm, inputs):
    x, w, labels = inputs
    margin = fm.SphereFaceR(1.3, 1, norm)
    for wrapped in (margin, fm.Annealed(margin), fm.SVSoftmax(1.2, margin)):
        got = margin_cross_entropy(x, w, labels, wrapped)
        torch.testing.assert_close(got, margin_cross_entropy(x, w, labels, wrapped, scale="norm"), rtol=0, atol=0)
        for scale in (30.0, torch.tensor(30.0), fm.AdaCos(C)):
            with pytest.raises(ValueError, match=r"whose scale is the norm of x; expected scale='norm' or None"):
                margin_cross_entropy(x, w, labels, wrapped, scale=scale)
    with pytest.raises(ValueError, match="SphereFaceR, whose scale is the norm of x"):
        fm.MarginHead(D, C, margin, 30.0)
    with pytest.raises(ValueError, match="SphereFaceR, whose scale is fixed; expected a number or norm='none'"):
        fm.MarginHead(D, C, fm.SphereFaceR(1.3, 1), "norm")
    with pytest.raises(ValueError, match="weight = 50 with norm='none'; it belongs to norm='hard' only"):
        fm.SphereFaceR(1.3, 1, "none", weight=50)


def test_a_softmax_takes_the_norm_where_it_is_given(inputs):
    x, w, labels = inputs
    got = margin_cross_entropy(x, w, labels, fm.SphereFace(4), scale="norm")
    found = oracle.cosines(x, w, labels)
    t = oracle.sphereface(found.c_y, 4)
    logits = x.norm(dim=1)[:, None] * torch.where(found.rival, found.c, t[:, None])
    torch.testing.assert_close(got, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("dynamic", [True, False])
def test_adacos_of_another_number_of_classes(dynamic, inputs):
    with pytest.raises(ValueError, match="AdaCos was made for 25 classes, and the head has 20"):
        margin_cross_entropy(*inputs, fm.NormFace(), scale=fm.AdaCos(25, dynamic))
    with pytest.raises(ValueError, match="AdaCos was made for 25 classes, and the head has 20"):
        fm.MarginHead(D, C, fm.NormFace(), fm.AdaCos(25, dynamic), dtype=torch.float64)(inputs[0], inputs[2])


def test_adacos_without_a_number_of_classes():
    for count in (2, 0, 3.5, "10", None):
        with pytest.raises(ValueError, match=r"num_classes = .*; expected an integer, at least 3"):
            fm.AdaCos(count)
    with pytest.raises(TypeError, match="num_classes"):
        fm.AdaCos()
    with pytest.raises(TypeError, match=r"scale is the class AdaCos; pass an instance, as in AdaCos\(num_classes\)"):
        fm.MarginHead(D, C, fm.NormFace(), fm.AdaCos)
    assert fm.AdaCos(C, False).s.item() == pytest.approx(math.sqrt(2) * math.log(C - 1))
